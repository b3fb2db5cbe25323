"use strict";
// Shows and hides what is on the page already; it makes no HTML, and reads texts only to look for words in them.
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  label();

  const browsers = [...document.querySelectorAll(".browser")].map((section) => {
    const bar = section.querySelector(".bar");
    if (!bar) return null;
    const steps = [...section.querySelectorAll(".step")];
    const range = bar.querySelector("input[type=range]");
    const find = bar.querySelector("input[type=search]");
    const kind = bar.querySelector(".kind");
    const colour = bar.querySelector(".colour");
    const nothing = section.querySelector(".nothing");
    const show = () => {
      const words = find.value.trim().toLowerCase();
      const at = Number(range.value);
      let found = 0;
      steps.forEach((step, place) => {
        let here = 0;
        for (const group of step.querySelectorAll(".group")) {
          const fits = (!kind.value || group.dataset.kinds.split(" ").includes(kind.value)) &&
            (!words || group.textContent.toLowerCase().includes(words));
          group.hidden = !fits;
          here += fits;
        }
        step.hidden = words ? here === 0 : place !== at;
        if (!step.hidden) found += here;
      });
      nothing.hidden = found > 0;
      bar.querySelector("output").textContent = words ? `${found} groups` : `step ${steps[at].dataset.step}`;
    };
    const move = (by) => {
      range.value = String(Math.min(steps.length - 1, Math.max(0, Number(range.value) + by)));
      find.value = "";
      show();
    };
    bar.hidden = false;
    for (const control of [range, find, kind]) control.addEventListener("input", show);
    colour.addEventListener("input", () => { section.dataset.colour = colour.value; });
    bar.querySelector(".previous").addEventListener("click", () => move(-1));
    bar.querySelector(".next").addEventListener("click", () => move(1));
    show();
    const reveal = (group) => {
      const place = steps.indexOf(group.closest(".step"));
      if (place < 0) return false;
      range.value = String(place); find.value = ""; kind.value = "";
      show();
      group.scrollIntoView();
      return true;
    };
    return { section, find, move, reveal, steps };
  }).filter(Boolean);

  const follow = () => {
    const target = location.hash.startsWith("#r") && document.getElementById(location.hash.slice(1));
    if (target && target.classList.contains("group")) browsers.some((each) => each.section.contains(target) && each.reveal(target));
  };
  addEventListener("hashchange", follow);
  follow();

  const nearest = () => browsers.find((each) => each.section.getBoundingClientRect().bottom > 80) || browsers[0];
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const browser = nearest();
    if (!browser) return;
    if (event.key === "/") { event.preventDefault(); browser.find.focus(); }
    if (event.key === "ArrowLeft") browser.move(-1);
    if (event.key === "ArrowRight") browser.move(1);
    if (event.key === "j" || event.key === "k") {
      const groups = [...browser.section.querySelectorAll(".step:not([hidden]) .group:not([hidden])")];
      const at = groups.indexOf(document.activeElement);
      const next = groups[Math.min(groups.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)))];
      if (next) { next.focus({ preventScroll: true }); next.scrollIntoView(); }
    }
  });
})();

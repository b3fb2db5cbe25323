"""The memory plan: what it says fits does, more memory never costs time, what cannot fit is refused with what can."""

import math
import re
from contextlib import suppress
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from grpo import memory, memory_trial
from grpo.build import build_policy
from grpo.config import Config
from grpo.errors import UserError
from grpo.memory import (
    ENGINE_BYTES,
    GIB,
    OF_A_BATCH,
    SPARE_BYTES,
    SPARE_SHARE,
    Asked,
    Need,
    choose,
    foresee,
    keep_within_now,
    settle,
)
from grpo.memory_of_run import at_work_of, plan_memory, settle_memory
from grpo.memory_trial import OF_CUDA_LATER, Sizes
from grpo.packing import fill
from grpo.policy import load_tokenizer
from grpo.policy.allocator import let_loose
from grpo.types import Completion, Group, Prompt

KIB = 1024

# About an 8B of 32 layers in NF4 with an adapter of rank 32.
SIZES = Sizes(
    others=int(0.6 * GIB),
    weights=int(5.8 * GIB),
    adapter=int(0.5 * GIB),
    parameters=84_000_000,
    layers=32,
    weights_per_layer=218e6,
    fixed=int(0.3 * GIB),
    recomputing=360.0 * KIB,
    kept_fixed=int(0.25 * GIB),
    one_kept=440.0 * KIB,
    keeping=102.0 * KIB,
    layer_input=8 * KIB,
    remembered=8 * KIB,
    head_fixed=int(0.75 * GIB),
    head=290.0 * KIB,
    small_head=int(0.25 * GIB),
)
NEED = Need(
    longest=768,
    longest_completion=512,
    tokens_per_step=8 * (256 + 8 * 512),
    sequences=64,
    kv_bytes_per_token=128 * KIB,
    bytes_per_parameter=8,
    gives_cache_back=(False, True),
    engine_bytes=int(1.1 * GIB),
)
FREE = Asked("auto", 0, 0)
LIMITS = [12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 141]


def plan_for(gib, need=NEED, asked=FREE, sizes=SIZES):
    return choose(sizes, need, int(gib * GIB), asked)


@pytest.mark.parametrize("gives_cache_back", [(True,), (False,), (False, True)])
@pytest.mark.parametrize("gib", LIMITS)
def test_a_plan_fits_and_has_a_treatment_for_every_layer(gib, gives_cache_back):
    plan = plan_for(gib, replace(NEED, gives_cache_back=gives_cache_back))
    assert max(plan.peaks) <= gib * GIB * (1 - SPARE_SHARE) - SPARE_BYTES
    assert len(plan.treatments) == SIZES.layers
    # Backwards the kept layers are first, and the last layer's input is wanted at once.
    assert plan.treatments == sorted(plan.treatments, key=["offload", "recompute", "keep"].index)
    assert plan.treatments[-1] != "offload"
    assert plan.tokens_per_batch >= NEED.longest


@pytest.mark.parametrize("longest", [768, 4096, 20_000])
def test_more_memory_never_costs_time(longest):
    need = replace(NEED, longest=longest, longest_completion=longest - 256)
    times = []
    for gib in LIMITS:
        try:
            plan = plan_for(gib, need)
        except UserError:
            assert not times  # what fits into less fits
            continue
        times.append((-plan.kv_cache, plan.time()))
    assert len(times) > 3
    assert times == sorted(times, reverse=True)


def test_with_plenty_everything_is_kept_and_the_whole_rollout_is_cached():
    plan = plan_for(96)
    assert set(plan.treatments) == {"keep"}
    assert plan.kv_cache >= NEED.sequences * NEED.longest * NEED.kv_bytes_per_token


@pytest.mark.parametrize(("gib", "longest"), [(24, 768), (24, 5000), (16, 5000)])
def test_no_other_plan_that_fits_is_faster(gib, longest):
    """Against every split of the layers and every size of a batch, with logits of few tokens at once too."""
    need = replace(NEED, longest=longest, sequences=8)
    plan = plan_for(gib, need)
    usable = gib * GIB * (1 - SPARE_SHARE) - SPARE_BYTES
    for tokens in range(longest, 33_000, 256):
        for kept in range(33):
            for offloaded, sizes in product(range(min(32 - kept, 31) + 1), (SIZES, SIZES.with_small_head())):
                other = replace(plan, sizes=sizes, tokens_per_batch=tokens, kept=kept, offloaded=offloaded)
                if max(other.peaks) <= usable:
                    assert other.time() >= 0.98 * plan.time()  # sizes of batches are a few


def test_where_sequences_are_long_layers_are_offloaded_and_not_computed_again():
    """An offloaded layer is given what attention gave, whose share of the time grows with the length."""
    kept = {}
    for longest in (768, 33_792):
        plan = plan_for(24, replace(NEED, longest=longest, longest_completion=longest - 256, sequences=2))
        kept[longest] = plan.treatments.count("keep")
        assert 0 < kept[longest] < 32 if longest == 768 else "offload" in plan.treatments
        assert ("recompute" in plan.treatments[:-1]) == (longest == 768)


@pytest.mark.parametrize("longest", [768, 33_792])
@pytest.mark.parametrize("parkable", [0, int(0.9 * GIB), int(5 * GIB), int(100 * GIB)])
def test_no_more_is_parked_than_the_host_has_memory_for(parkable, longest):
    need = replace(NEED, longest=longest, longest_completion=longest - 256, sequences=2)
    for asked in (FREE, Asked("offload", 0, 0)):
        plan = plan_for(32, replace(need, parkable=parkable), asked)
        of_a_layer = (SIZES.layer_input + SIZES.remembered) * max(plan.tokens_per_batch, longest)
        assert plan.offloaded * of_a_layer <= parkable
        assert max(plan.peaks) <= 32 * GIB


@pytest.mark.parametrize("gib", LIMITS)
def test_a_step_is_laid_out_in_as_many_batches_as_were_counted(gib):
    plan = plan_for(gib)
    completion = Completion([0] * 512, [0.0] * 512, "", "length", 0)
    groups = [Group(Prompt(row, "", [0] * 256, {}), [completion] * 8) for row in range(8)]
    rows = fill([(group, list(range(8))) for group in groups], plan.tokens_per_batch)
    assert len(rows) <= math.ceil(NEED.tokens_per_step / (plan.tokens_per_batch - NEED.longest))


def test_the_longest_sequence_decides_where_it_is_longer_than_a_batch():
    need = replace(NEED, longest=120_000, longest_completion=100_000, sequences=1)
    plan = plan_for(80, need)
    assert plan.tokens_per_batch == 120_000
    assert "offload" in plan.treatments or "recompute" in plan.treatments


def test_the_cache_is_given_back_where_that_is_faster_and_only_there():
    assert not plan_for(141).gives_cache_back
    assert plan_for(12).gives_cache_back
    for gib in LIMITS:
        plan = plan_for(gib)
        others = []
        for given in (True, False):
            with suppress(UserError):
                others.append(plan_for(gib, replace(NEED, gives_cache_back=(given,))))
        # The cache comes first: with a smaller one sequences would wait for each other.
        assert (-plan.kv_cache, plan.time()) == min((-other.kv_cache, other.time()) for other in others)


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        (Asked("none", 0, 0), lambda plan: plan.kept == 32),
        (Asked("layer", 0, 0), lambda plan: plan.treatments == ["recompute"] * 32),
        (Asked("offload", 0, 0), lambda plan: plan.treatments == ["offload"] * 31 + ["recompute"]),
        (Asked("auto", 5000, 0), lambda plan: plan.tokens_per_batch == 5000),
        (Asked("auto", 300, 0), lambda plan: plan.tokens_per_batch == 300),
        (Asked("auto", 0, 3 * GIB), lambda plan: plan.kv_cache == 3 * GIB),
    ],
)
def test_every_choice_can_be_overruled(asked, held):
    assert held(plan_for(24, asked=asked))


@pytest.mark.parametrize(
    ("gib", "need", "asked"),
    [
        (12, replace(NEED, longest=40_000, longest_completion=39_000), FREE),
        (24, replace(NEED, longest=400_000, longest_completion=399_000, gives_cache_back=(False,)), FREE),
        (12, replace(NEED, longest=40_000, longest_completion=39_000), Asked("none", 0, 0)),
    ],
)
def test_what_cannot_fit_is_refused_with_what_can(gib, need, asked):
    with pytest.raises(UserError, match=r"does not fit into .* lower --max-completion-tokens to ([\d,]+)\.") as refused:
        plan_for(gib, need, asked)
    fits = int(re.search(r"lower --max-completion-tokens to ([\d,]+)\.", str(refused.value))[1].replace(",", ""))
    prompts = need.longest - need.longest_completion
    assert 0 < fits < need.longest_completion
    nearest = replace(need, longest=prompts + fits, longest_completion=fits)
    assert max(plan_for(gib, nearest).peaks) <= gib * GIB
    further = replace(need, longest=prompts + int(1.1 * fits) + 2048, longest_completion=int(1.1 * fits) + 2048)
    with pytest.raises(UserError):
        plan_for(gib, further)


def test_a_resumed_run_keeps_its_batches_where_they_fit():
    began = replace(NEED, batch_before=plan_for(80).tokens_per_batch + 7)
    assert plan_for(80, began).tokens_per_batch == plan_for(40, began).tokens_per_batch == began.batch_before
    huge = replace(NEED, batch_before=200_000)  # of a larger card: no reason to refuse the run on this one
    assert plan_for(24, huge) == replace(plan_for(24), need=huge)
    assert plan_for(24, began, Asked("auto", 5000, 0)).tokens_per_batch == 5000


def test_weights_that_do_not_fit_are_told():
    with pytest.raises(UserError, match=r"weights, adapter and engine alone take 8\.\d\. Take a smaller model"):
        plan_for(8)


def test_an_engine_may_turn_out_smaller_than_is_set_aside_for_it():
    need = replace(NEED, engine_bytes=ENGINE_BYTES)
    assert foresee(SIZES, need, 24 * GIB, FREE) == choose(SIZES, need, 24 * GIB, FREE)
    small = 10 * GIB
    with pytest.raises(UserError):
        choose(SIZES, need, small, FREE)
    plan = foresee(SIZES, need, small, FREE)
    assert plan.need.engine_bytes < ENGINE_BYTES and max(plan.peaks) <= small
    with pytest.raises(UserError):
        foresee(SIZES, replace(need, engine_bytes=0), 7 * GIB, FREE)


def test_scales_are_quantised_too_where_nothing_fits_otherwise_and_only_there():
    sizes = replace(SIZES, spared=GIB // 2)
    low, smallest = 8.0, 12.0  # GiB
    while smallest - low > 0.05:
        middle = (low + smallest) / 2
        low, smallest = (low, middle) if fits(SIZES, middle) else (middle, smallest)
    for gib in (smallest, 24):
        assert foresee(sizes, NEED, int(gib * GIB), FREE).sizes.weights == sizes.weights
    plan = foresee(sizes, NEED, int((smallest - 0.25) * GIB), FREE)
    assert plan.sizes.double_quantised and plan.sizes.weights == SIZES.weights - GIB // 2
    assert "their scales in 8 bits too" in plan.table() and "--double-quant" in plan.table()
    assert fits(sizes, smallest - 0.45) and not fits(sizes, smallest - 0.6)


def test_logits_of_few_tokens_at_once_are_for_little_memory():
    """What they save is what a large chunk of them takes; they cost time, so with plenty they are not taken."""
    assert plan_for(96).sizes == SIZES and "at once" not in plan_for(96).table()
    short = next(gib for gib in (9 + tenth / 10 for tenth in range(40)) if fits(SIZES, gib))
    plan = plan_for(short)
    assert plan.sizes.head_rows == 256 and plan.sizes.head_fixed == SIZES.small_head
    assert "logits of 256 tokens at once" in plan.table()
    assert not fits(replace(SIZES, small_head=0), short)
    # A head that has no more anyway is left as it is.
    small = replace(SIZES, head_fixed=SIZES.small_head)
    assert plan_for(short, sizes=small).sizes == small


def fits(sizes, gib):
    try:
        foresee(sizes, NEED, int(gib * GIB), FREE)
    except UserError:
        return False
    return True


def test_a_mixture_takes_the_time_of_what_its_tokens_meet_and_unpacks_all_of_it():
    """Sixteen times the weights, of which a token meets a sixteenth: a batch's own, in such tokens, is sixteen-fold."""
    mixture = replace(SIZES, weights_per_layer=16 * SIZES.weights_per_layer, met=1 / 16)
    for plan in (plan_for(24), plan_for(80), replace(plan_for(80), gives_cache_back=True)):
        batch = plan.tokens_per_batch
        batches = 1 if batch >= NEED.tokens_per_step else math.ceil(NEED.tokens_per_step / (batch - NEED.longest))
        more = replace(plan, sizes=mixture).time() - plan.time()
        assert more == pytest.approx(15 * OF_A_BATCH * batches)
    # So larger batches are worth layers that are computed again.
    assert plan_for(24, sizes=mixture).tokens_per_batch > plan_for(24).tokens_per_batch
    assert plan_for(24, sizes=mixture).kept < plan_for(24).kept


def test_what_was_asked_for_and_does_not_fit_is_named():
    with pytest.raises(
        UserError, match=r"24.0 GiB with --recompute none, --tokens-per-batch 16384\. It does where that is left"
    ):
        plan_for(24, asked=Asked("none", 16384, 0))


@pytest.mark.parametrize("gives_cache_back", [True, False])
def test_the_table_adds_up(gives_cache_back):
    plan = plan_for(80, replace(NEED, gives_cache_back=(gives_cache_back,)))
    first, *rows = plan.table().splitlines()
    sizes = [float(re.search(r"  (\d+\.\d\d)", row)[1]) for row in rows]
    rollout, update = (float(x) for x in re.findall(r"(\d+\.\d) in an? ", first))
    *standing, cache, activations = sizes
    assert sum(standing) + cache == pytest.approx(rollout, abs=0.1)
    held = 0 if gives_cache_back else cache
    assert sum(standing) + held + activations == pytest.approx(update, abs=0.1)


def test_a_run_without_rollouts_on_its_gpu_speaks_of_none():
    told = plan_for(24, replace(NEED, kv_bytes_per_token=0, engine_bytes=GIB // 5)).table()
    assert "rollout" not in told and "engine" not in told and "KV cache" not in told
    assert re.search(r"the rest +0\.20", told)


def test_an_optimizer_in_8_bits_is_named_where_it_makes_room():
    """Six bytes a parameter less: half a GiB here."""
    tight = min(gib for gib in (x / 20 for x in range(160, 320)) if fits_in(gib, replace(NEED, bytes_per_parameter=2)))
    with pytest.raises(UserError, match=r"With --optimizer adamw8bit it fits as it is\.$"):
        plan_for(tight)
    for gib, need in ((tight - 0.1, NEED), (tight - 0.1, replace(NEED, bytes_per_parameter=2))):
        with pytest.raises(UserError, match=r"^(?!.*adamw8bit)"):
            plan_for(gib, need)


def fits_in(gib, need):
    with suppress(UserError):
        return bool(plan_for(gib, need))
    return False


IN_8_BITS = replace(NEED, bytes_per_parameter=2, beside_pages=10 * 2**20)
OF_PAGES = 2 * SIZES.parameters - IN_8_BITS.beside_pages  # bytes that they take off the GPU
ONE_WAY = Asked("layer", 768, 0)  # which leaves the plan little to try


def least(holds):
    """The least memory, GiB, that this is true with, where it is with all that is more."""
    low, high = 4.0, 20.0
    while high - low > 0.002:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def foreseen(gib, need, sizes=SIZES, asked=ONE_WAY):
    with suppress(UserError):
        return foresee(sizes, need, int(gib * GIB), asked)
    return None


@pytest.mark.parametrize("spared", [0, GIB // 2])
def test_the_optimizer_is_in_pages_where_nothing_fits_otherwise_and_only_there(spared):
    """After a smaller engine than expected, and after scales that are quantised too."""
    sizes = replace(SIZES, spared=spared)
    need = replace(IN_8_BITS, engine_bytes=ENGINE_BYTES)
    may = replace(need, may_page=True)
    without, with_pages = least(lambda gib: foreseen(gib, need, sizes)), least(lambda gib: foreseen(gib, may, sizes))
    assert without - with_pages == pytest.approx(OF_PAGES / GIB / (1 - SPARE_SHARE), abs=0.01)
    for gib in (without, without + 0.3, 24, 80):
        assert foreseen(gib, may, sizes).need.paged is False
        # The plan is the one that is made where there are no pages to choose.
        assert replace(foreseen(gib, may, sizes), need=need) == replace(foreseen(gib, need, sizes), need=need)
    plan = foreseen(with_pages, may, sizes)
    assert plan.need.paged and plan.need.engine_bytes < ENGINE_BYTES and plan.sizes.double_quantised == bool(spared)
    assert max(plan.peaks) <= with_pages * GIB
    # Where pages would be enough, so is a smaller engine, or scales that are quantised too: these are tried before.
    as_it_is = least(lambda gib: foreseen(gib, need))
    if spared:
        plan = foreseen(as_it_is - 0.05, may, sizes)
        assert plan.sizes.double_quantised and not plan.need.paged
    expected = least(lambda gib: foreseen(gib, replace(need, engine_bytes=ENGINE_BYTES - 1)))
    plan = foreseen(expected - 0.05, may, sizes)
    assert plan.need.engine_bytes < ENGINE_BYTES - 1 and not plan.need.paged
    # With a little less than is enough without, pages are enough by themselves, and the base stays as it is.
    near = foreseen(as_it_is - OF_PAGES / GIB / 2, may)
    assert near.need.paged and not near.sizes.double_quantised


def test_pages_are_for_8_bits_and_where_they_may_be():
    may = replace(NEED, may_page=True, beside_pages=IN_8_BITS.beside_pages)
    short = least(lambda gib: foreseen(gib, NEED))
    assert not foreseen(short, may).need.paged
    assert foreseen(short - 0.01, may) is None  # moments in float32 have no pages
    short = least(lambda gib: foreseen(gib, IN_8_BITS))
    assert foreseen(short - 0.01, IN_8_BITS) is None and foreseen(short - 0.01, replace(IN_8_BITS, may_page=True))


def test_pages_that_were_asked_for_are_there_with_plenty_too():
    asked, plenty = replace(IN_8_BITS, paged=True), foreseen(80, IN_8_BITS)
    plan = foreseen(80, asked)
    assert plan.need.paged and plan.standing == plenty.standing - OF_PAGES
    assert re.search(
        r"optimizer, its state in pages of the host's memory +0\.01  --optimizer, --page-opt", plan.table()
    )
    assert re.search(r"optimizer +0\.16  --optimizer$", plenty.table(), re.M) and "pages" not in plenty.table()


def test_a_plan_with_pages_is_short_of_memory_unless_they_were_asked_for():
    plan = foreseen(141, replace(IN_8_BITS, paged=True), asked=FREE)
    assert not plan.is_short(FREE) and replace(plan, need=replace(plan.need, may_page=True)).is_short(FREE)


@pytest.mark.parametrize("may_page", [True, False])
def test_8_bits_are_named_where_they_make_room_with_pages_too(may_page):
    """Asked of the run itself, which has the plan put its optimizer into pages by itself."""
    need = replace(NEED, may_page=may_page, beside_pages=IN_8_BITS.beside_pages)
    in_8_bits = replace(IN_8_BITS, may_page=may_page)
    enough = least(lambda gib: foreseen(gib, in_8_bits))
    assert foreseen(enough, in_8_bits).need.paged == may_page
    with pytest.raises(UserError, match=r"With --optimizer adamw8bit it fits as it is\.$"):
        foresee(SIZES, need, int(enough * GIB), ONE_WAY)
    for each in (need, in_8_bits):
        with pytest.raises(UserError, match=r"^(?!.*adamw8bit)"):
            foresee(SIZES, each, int((enough - 0.01) * GIB), ONE_WAY)


def test_an_engine_that_takes_more_than_was_foreseen_has_the_optimizer_in_pages():
    gib = least(lambda gib: foreseen(gib, IN_8_BITS))
    before = foreseen(gib, replace(IN_8_BITS, may_page=True))
    measured = replace(before.need, engine_bytes=before.need.engine_bytes + OF_PAGES // 2, cache_stands=before.kv_cache)
    plan = settle(before.sizes, measured, before.limit, ONE_WAY)
    assert not before.need.paged and plan.need.paged
    with pytest.raises(UserError):
        settle(before.sizes, replace(measured, may_page=False), before.limit, ONE_WAY)
    with pytest.raises(UserError):
        settle(before.sizes, replace(measured, engine_bytes=before.need.engine_bytes + GIB), before.limit, ONE_WAY)


class Standing:
    """An engine that is there and takes what the test says."""

    def release(self):
        pass


@pytest.mark.parametrize("more", [0, OF_PAGES // 2])
def test_the_policys_optimizer_is_as_planned(more, tiny_config, monkeypatch):
    config = tiny_config(optimizer="adamw8bit", lora_rank=8, recompute="layer", tokens_per_batch=768)
    policy = build_policy(config, load_tokenizer("embedded"), 32)
    layers = replace(SIZES, layers=len(policy.model.layers))
    gib = least(lambda gib: foreseen(gib, IN_8_BITS, layers))
    before = foreseen(gib, replace(IN_8_BITS, may_page=True), layers)
    held = 0 if before.gives_cache_back else before.kv_cache
    engine = before.need.engine_bytes + more
    in_use = before.sizes.others + before.sizes.weights + before.sizes.adapter + held + engine
    monkeypatch.setattr(memory_trial, "taken", lambda device: in_use)
    told = []
    monkeypatch.setattr(memory, "keep_within_now", lambda *given: None)
    plan = settle_memory(before, config, policy, Standing(), [], told.append)
    assert plan.need.engine_bytes == engine
    assert policy.optimizer.is_paged == plan.need.paged == ("in pages" in told[0]) == bool(more)


READING = replace(SIZES, reading_fixed=int(0.2 * GIB), reading=100.0 * KIB)
READS = replace(NEED, read_at_once=4096, logits=GIB // 640)
AT_WORK = READING.read(4096)


@pytest.mark.parametrize("gib", LIMITS)
def test_what_an_engine_has_at_work_is_part_of_a_rollout_and_not_of_an_update(gib):
    plan, without = plan_for(gib, READS, sizes=READING), plan_for(gib)
    rollout, update = plan.peaks
    assert rollout == plan.standing + plan.kv_cache + AT_WORK <= gib * GIB * (1 - SPARE_SHARE) - SPARE_BYTES
    assert update == plan.standing + plan.update + (0 if plan.gives_cache_back else plan.kv_cache)
    assert plan.kv_cache <= without.kv_cache
    assert f"at work on prompts{AT_WORK / GIB:>12.2f}" in re.sub(r"prompts\s+", "prompts" + " " * 8, plan.table())


def test_drawing_for_many_may_take_more_than_reading():
    assert plan_for(80, replace(READS, logits=AT_WORK // 32), sizes=READING).at_work == 2 * (AT_WORK // 32) * 32
    assert plan_for(80, replace(READS, at_work=GIB), sizes=READING).at_work == GIB  # measured


def test_a_cache_that_leaves_an_engine_nothing_to_work_with_is_refused_with_one_that_does():
    """Of layers so small that it is the rollout that does not fit."""
    of_a_token = dict(recomputing=20.0 * KIB, head=20.0 * KIB, layer_input=256, remembered=0)
    small = replace(READING, **of_a_token, small_head=0, head_fixed=2**20)
    long = replace(READS, longest=6000, longest_completion=5744, sequences=4096)
    with pytest.raises(UserError, match=r"\. ([\d,]+) tokens do: lower --max-completion-tokens") as refused:
        plan_for(10.3, long, sizes=small)
    fits = int(re.search(r"\. ([\d,]+) tokens do", str(refused.value))[1].replace(",", ""))
    plan = plan_for(10.3, replace(long, longest=fits, longest_completion=fits - 256), sizes=small)
    assert plan.peaks[0] > plan.peaks[1]


def test_a_cache_of_few_sequences_has_few_written_at_once():
    """What is drawn from takes memory for each; a cache of thirteen does not hold hundreds."""
    many = replace(READS, sequences=512, logits=2**21)
    plans = {gib: plan_for(gib, many, sizes=READING) for gib in (10.5, 12, 16, 24, 48, 141)}
    for plan in plans.values():
        held = plan.kv_cache / (many.longest * many.kv_bytes_per_token)
        assert plan.sequences <= 4 * held and plan.at_work == max(AT_WORK, plan.sequences * 2**21)
        assert plan.sequences == min(512, int(4 * held))
        told = f"{plan.sequences:,} sequences at once"
        assert (told in plan.table()) == (plan.sequences < 512) == ("--max-num-seqs" in plan.table())
        assert plan.settled(Config()).max_num_seqs == plan.sequences
    assert plans[10.5].sequences < 64 and plans[141].sequences == 512
    assert plan_for(10.5, replace(many, kv_bytes_per_token=0, read_at_once=0)).sequences == 512  # another process'


def test_a_flag_is_not_blamed_for_what_is_not_its_doing():
    """A rollout that does not fit beside the cache that stands fits no better with other layers."""
    plan = plan_for(24, READS, sizes=READING)
    at_work = 24 * GIB - plan.standing - plan.kv_cache // 2
    stands = replace(plan.need, cache_stands=plan.kv_cache, at_work=at_work, gives_cache_back=(True,))
    with pytest.raises(UserError, match=r"beside a KV cache of .* GiB\. Give it less with --kv-cache-gib\.$"):
        choose(READING, stands, 24 * GIB, Asked("layer", 0, 0))
    with pytest.raises(UserError, match=r"engine alone take \d+\.\d\. Take a smaller model"):
        choose(READING, replace(READS, at_work=16 * GIB), 24 * GIB, FREE)


class Drawing:
    """An engine whose memory is counted by the test."""

    def __init__(self):
        self.held = self.highest = 9 * GIB
        self.requests = []

    def sample(self, requests):
        self.requests.append(requests)
        self.highest = max(self.highest, self.held + GIB // 2 // len(self.requests))

    def release(self):
        self.requests.append("released")


def counted_by(engine, monkeypatch):
    for name, instead in {
        "empty_cache": lambda: None,
        "memory_reserved": lambda: engine.held,
        "max_memory_reserved": lambda: engine.highest,
        "reset_peak_memory_stats": lambda: setattr(engine, "highest", engine.held),
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)


@pytest.mark.parametrize(
    ("sequences", "longest", "prompts", "length"),
    [(64, 768, 6, 767), (2, 9000, 1, 4096), (3, 20, 3, 19), (1, 2, 1, 1), (512, 2000, 3, 1999)],
)
def test_what_an_engine_has_at_work_is_measured_on_as_much_as_it_reads_and_draws_at_once(
    sequences, longest, prompts, length, monkeypatch
):
    engine = Drawing()
    counted_by(engine, monkeypatch)
    need = replace(READS, sequences=sequences, longest=longest, read_at_once=min(4096, sequences * longest))
    plan = replace(plan_for(80, need, sizes=READING), kv_cache=sequences * longest * need.kv_bytes_per_token)
    assert at_work_of(engine, plan, list(range(50, 300))) == GIB // 2
    long_ones, short_ones = ([request.context for request in requests] for requests in engine.requests)
    assert len(long_ones) == prompts and {len(context) for context in long_ones} == {length}
    assert length == 1 or len(set(map(tuple, long_ones))) == prompts  # equal ones are read once
    assert len(short_ones) == sequences and {len(context) for context in short_ones} == {1}
    assert {token for context in long_ones + short_ones for token in context} <= set(range(50, 300))
    assert all(request.max_tokens == 1 for requests in engine.requests for request in requests)
    assert engine.held + GIB // 2 == engine.highest  # the higher of both


def test_what_was_measured_takes_the_place_of_what_was_reckoned(tiny_config, monkeypatch):
    """Before the cache is let go of; and PyTorch is held to what is left, whether a limit was given or not."""
    policy = build_policy(tiny_config(), load_tokenizer("embedded"), 32)
    sizes = replace(READING, layers=len(policy.model.layers))
    before, engine, held = plan_for(40, READS, sizes=sizes), Drawing(), []
    counted_by(engine, monkeypatch)
    in_use = before.standing + (0 if before.gives_cache_back else before.kv_cache)
    monkeypatch.setattr(memory_trial, "taken", lambda device: in_use)
    monkeypatch.setattr(memory, "keep_within_now", lambda *given: held.append(given))
    plan = settle_memory(before, tiny_config(), policy, engine, list(range(50, 300)), lambda told: None)
    assert before.need.at_work is None and plan.need.at_work == plan.at_work == GIB // 2
    assert engine.requests[-1] == "released" and len(engine.requests) == 3
    assert held == [(plan, in_use, policy.device)]


def test_a_limit_that_nothing_is_kept_to_is_told(tiny_config):
    config, told = tiny_config(memory_gib=1.0), []
    policy = build_policy(config, load_tokenizer("embedded"), 32)
    assert plan_memory(config, policy, 32, 0, GIB, told.append) is None
    [note] = told
    assert "--memory-gib is of a GPU's memory" in note


@pytest.mark.parametrize("cuda_gib", [0.8, 1.1])
def test_what_cuda_has_grown_by_is_not_pytorchs_to_take(cuda_gib, monkeypatch):
    """All of a card together stays below the limit, whatever CUDA itself had when the plan was made; a cache that was
    given back is still counted by PyTorch, and does not lie on the card."""
    card, limit, own, cache = 80 * GIB, 14 * GIB, 9 * GIB, 2 * GIB
    shares = []
    for name, instead in {
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: own + cache,
        "mem_get_info": lambda device: (card - own - int(cuda_gib * GIB), card),
        "get_device_properties": lambda device: SimpleNamespace(total_memory=card),
        "set_per_process_memory_fraction": lambda fraction, device: shares.append(fraction),
        "get_per_process_memory_fraction": lambda device: 1.0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    plan = replace(plan_for(14), limit=limit, kv_cache=cache, gives_cache_back=True)
    taken = own + int(cuda_gib * GIB)
    keep_within_now(plan, taken, torch.device("cuda"))
    more = shares[0] * card - own - cache  # than PyTorch has
    keep_within_now(plan, taken + 60 * GIB, torch.device("cuda"))  # while another process is there, for a while
    let_loose()
    assert taken + more == pytest.approx(limit - OF_CUDA_LATER / 2)
    rollout, update = plan.peaks
    assert shares[1] * card == pytest.approx(max(rollout, update + cache) - plan.sizes.others)


def test_a_plan_is_short_where_more_memory_would_help_and_not_where_the_user_chose():
    without_vllm = replace(NEED, gives_cache_back=(True,), kv_bytes_per_token=0, engine_bytes=0)
    assert not plan_for(141, without_vllm).is_short(FREE)  # it gives a cache back that nobody has
    assert not plan_for(141).is_short(FREE)
    assert plan_for(24).is_short(FREE)
    asked = Asked("layer", 0, 0)
    assert not plan_for(141, asked=asked).is_short(asked)
    asked = Asked("auto", 0, int(2 * GIB))
    assert not plan_for(141, asked=asked).is_short(asked)

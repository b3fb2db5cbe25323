"""Doctor: would a run start here, with what, and what keeps it from being faster? Trains nothing, loads no weights.

    __main__.py    the command: finds out, shows, and says by its exit code whether a run would start
    findings.py    Finding: what is so, how much it weighs, and one remedy
    versions.py    what is installed, beside what is allowed and what was run
    machine.py     GPU, driver, compiler, disk, hub
    choice.py      what a task's configuration comes to: engine, kernels, layers, memory, data
    trial.py       vLLM imported in a process of its own

Each looks and says what it found; only `__main__` knows them all. Whatever is broken is a finding: a library that
cannot be imported ends nothing here.
"""

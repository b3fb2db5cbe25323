"""The inside of the sandbox: a script that takes its own rights away and then runs a program. Never imported by a run.

Knows nothing of tests. Started by grpo/rewards/sandbox.py as `python -I confined.py SETTINGS`; it uses the standard
library alone, and what the kernel does not offer it goes without: what is in force it tells before the program runs.

    a user namespace     the process is nobody on this machine, whoever started it
    a PID namespace      all that it starts ends with it, and no other process can be seen or signalled
    a network namespace  without any device
    a mount namespace    its folder is a file system in memory with a size of its own
    Landlock             the files of the interpreter can be read, its own folder written; nothing else can be opened
    resource limits      seconds of CPU, memory, size of a file, open files, processes
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
from types import ModuleType
from typing import Any

_NEW_USER = 0x10000000  # flags of unshare
_NAMESPACES = {"ipc": 0x8000000, "network": 0x40000000, "processes": 0x20000000, "mounts": 0x20000}
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_MS_NOSUID_NODEV, _MS_REC_PRIVATE = 2 | 4, 0x4000 | 0x40000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # system calls, the same on all architectures
_CAPSET = {"x86_64": 126, "aarch64": 91}
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, read a folder
_READ_FILE = 1 << 0 | 1 << 2
_WRITE_FILE = 1 << 1
_RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}  # bits of rights on files that a version of Landlock knows
_ALL_RIGHTS = 16
_READABLE = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives",
    "/dev/urandom", "/dev/random", "/dev/zero", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu",
)  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any]) -> None:
    """Confine this process as far as it goes, then run the program in the folder."""
    spaces = _leave_namespaces()
    _end_with_parent()
    if os.getppid() != settings["parent"]:  # it has ended already
        return
    if "processes" in spaces:
        _go_on_as_first_process()
    folder = settings["folder"]
    private = "mounts" in spaces and _mount_memory(folder, settings["files_mib"])
    _give_up_capabilities()
    _end_with_parent()
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.chdir(folder)
    program = os.read(settings["program"], 1 << 26)
    while more := os.read(settings["program"], 1 << 26):
        program += more
    is_landlocked = _landlock(folder)
    _limit_resources(settings)
    in_force = {**dict.fromkeys(spaces, True), "memory folder": private, "files": is_landlocked}
    os.write(settings["status"], json.dumps(in_force).encode())
    os.close(settings["status"])  # the program cannot change what it says
    sys.argv, sys.path[0:0] = ["program.py"], [folder]
    module = ModuleType(settings["name"])
    vars(module)["REPORT"] = settings["report"]
    sys.modules[settings["name"]] = module  # dataclasses and pickle look there for what it defines
    exec(compile(program, "program.py", "exec"), vars(module))


def _leave_namespaces() -> list[str]:
    """New namespaces, as many as this kernel lets this user have; their names."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER):
        return []
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        pass  # then it is nobody, and cannot mount
    return ["user", *(name for name, flag in _NAMESPACES.items() if not libc.unshare(flag))]


def _go_on_as_first_process() -> None:
    """In a new PID namespace a child is its first process; the parent waits, and ends as it ends."""
    lives, held = os.pipe()
    child = os.fork()
    if child:
        os.close(lives)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    _end_with_parent()
    os.close(held)
    if select.select([lives], [], [], 0)[0]:  # nobody holds the other end: the parent has ended already
        os._exit(1)
    os.close(lives)


def _end_with_parent() -> None:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _mount_memory(folder: str, files_mib: int) -> bool:
    """A file system in memory over the folder: it is bounded, and gone with the process."""
    if libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None):
        return False
    options = f"size={files_mib}m,nr_inodes=4096,mode=700".encode()
    return not libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID_NODEV, options)


def _give_up_capabilities() -> None:
    number = _CAPSET.get(os.uname().machine)
    if number:
        header = struct.pack("Ii", 0x20080522, 0)
        libc.syscall(number, header, bytes(24))


def _landlock(folder: str) -> bool:
    """Whether only the interpreter's files can be read from here on, and only the folder be written."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    handled = (1 << _RIGHTS_OF_VERSION.get(version, _ALL_RIGHTS)) - 1
    attributes = struct.pack("QQ", handled, 3) if version >= 4 else struct.pack("Q", handled)  # 3: bind, connect
    rules = libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        return False
    interpreter = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    for path in (*_READABLE, *interpreter):
        _allow(rules, path, (_READ if os.path.isdir(path) else _READ_FILE) & handled)
    _allow(rules, "/dev/null", (_READ_FILE | _WRITE_FILE) & handled)
    _allow(rules, folder, handled)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    is_restricted = not libc.syscall(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return is_restricted


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # there is no such file here
    libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, descriptor), 0)
    os.close(descriptor)


def _limit_resources(settings: dict[str, Any]) -> None:
    mib = 1 << 20
    limits = {
        resource.RLIMIT_CPU: settings["seconds"],
        resource.RLIMIT_AS: settings["memory_mib"] * mib,
        resource.RLIMIT_FSIZE: settings["files_mib"] * mib,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: settings["processes"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

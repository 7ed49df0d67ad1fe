"""The walls around one submission, put up by the process itself before it runs anything of the student's.

bubblewrap makes the room that all submissions of a grader share: no network, a read-only system, nothing of the
instructor's. Within it each submission gets its own process and IPC space and its own scratch folders, loses every
capability, and runs under resource limits and a system-call filter. Linux only; every call goes through libc.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NEWNS, NEWUSER, NEWPID, NEWIPC = 0x20000, 0x10000000, 0x20000000, 0x08000000
_NEW_ANY = 0x7E020000 | 0x80  # every CLONE_NEW* flag
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _CAPBSET_DROP, _SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
SCRATCH = "/tmp"
PRIVATE_FOLDERS = (SCRATCH, "/dev/shm")


@dataclass(frozen=True)
class Walls:
    """What holds for one submission. Sizes in bytes; `memory` is what it may allocate beyond the warm parent's.

    `apart` asks for process and IPC spaces of its own, `private` for scratch folders of its own, `filtered` for the
    filter of system calls. `uid` is the real user to become, where the warm parent is root. `kept` are folders within
    the scratch folders that stay to be seen, read-only as they are (a Python that lives in /tmp).
    """

    memory: int = 2 << 30
    scratch: int = 256 << 20
    processes: int = 64
    files: int = 1024
    uid: int = 60_000
    apart: bool = True
    private: bool = True
    filtered: bool = True
    kept: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Walls:
        return cls(**given)


def enter_spaces(walls: Walls) -> None:
    """Leave the shared spaces. The next fork is process 1 of a process space of its own."""
    root = os.getuid() == 0
    flags = (NEWPID | NEWIPC if walls.apart else 0) | (NEWNS if walls.private or walls.apart else 0)
    if not flags:
        return
    uid, gid = os.getuid(), os.getgid()
    _call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)  # the files below are its own only so
    _call("unshare", flags if root else flags | NEWUSER)
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def mount_private(walls: Walls) -> None:
    """Empty scratch folders of limited size, and a /proc that shows this process space alone."""
    if walls.apart or walls.private:
        _call("mount", None, b"/", None, _REC | _PRIVATE, None)
    if walls.private:
        options = f"size={walls.scratch},nr_inodes=20000,mode=1777".encode()
        kept = [(os.open(path, os.O_PATH), path) for path in walls.kept]
        for folder in PRIVATE_FOLDERS:
            _call("mount", b"tmpfs", folder.encode(), b"tmpfs", _NOSUID | _NODEV, options)
        for handle, path in kept:  # what is covered is still there, under its handle
            os.makedirs(path, 0o755)
            _call("mount", f"/proc/self/fd/{handle}".encode(), path.encode(), None, _BIND | _REC, None)
            os.close(handle)
    if walls.apart:
        _call("mount", b"proc", b"/proc", b"proc", _NOSUID | _NODEV | _NOEXEC, None)


def drop_rights(walls: Walls) -> None:
    """Become an ordinary user without capabilities, for good."""
    for capability in range(64):
        if _libc().prctl(_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(walls.uid, walls.uid, walls.uid)
        os.setresuid(walls.uid, walls.uid, walls.uid)
    header, empty = struct.pack("II", 0x20080522, 0), bytes(24)
    _call("capset", header, empty)
    _call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)


def set_limits(walls: Walls) -> None:
    """Memory, processes, open files, size of a file, core dumps. RLIMIT_NPROC counts a user's tasks, never root's."""
    mine = _data_bytes() + walls.memory
    for kind, most in ((resource.RLIMIT_DATA, mine), (resource.RLIMIT_NPROC, walls.processes),
                       (resource.RLIMIT_NOFILE, walls.files), (resource.RLIMIT_FSIZE, walls.scratch),
                       (resource.RLIMIT_CORE, 0), (resource.RLIMIT_MEMLOCK, 1 << 16), (resource.RLIMIT_MSGQUEUE, 0)):
        hard = resource.getrlimit(kind)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (value, value))


def give_back_memory() -> None:
    """Have the C library return blocks at once: freed ones that it keeps and cannot use would count as used.

    A loop that keeps one number of every block of 64 KiB would otherwise leave a hole before each of these numbers, and
    take up as much as if it had kept all blocks.
    """
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 15)  # M_MMAP_THRESHOLD


def hide_memory() -> None:
    """No process of the same user may look into this one."""
    _call("prctl", _SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    _call("prctl", _SET_PDEATHSIG, 9, 0, 0, 0)


def filter_calls() -> None:
    """Refuse the system calls that no answer needs and that reach other processes or the kernel's inside."""
    program = _program(platform.machine())
    if program is None:
        return
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _call("prctl", _SET_SECCOMP, 2, head, 0, 0)


# (x86_64, aarch64): ptrace, process_vm_readv, process_vm_writev, mount, umount2, pivot_root, chroot, unshare, setns,
# keyctl, add_key, request_key, bpf, perf_event_open, userfaultfd, io_uring_setup, open_tree, move_mount, fsopen,
# fsmount, kexec_load, init_module, finit_module, pidfd_getfd
_REFUSED = {
    "x86_64": (101, 310, 311, 165, 166, 155, 161, 272, 308, 250, 248, 249, 321, 298, 323, 425, 428, 429, 430, 432, 246,
               175, 313, 438),
    "aarch64": (117, 270, 271, 40, 39, 41, 51, 97, 268, 219, 217, 218, 280, 241, 282, 425, 428, 429, 430, 432, 104,
                105, 273, 438),
}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_LOAD, _EQUAL, _ATLEAST, _SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def _program(machine: str) -> bytes | None:
    """The filter as classic BPF; None for a processor whose call numbers are not listed."""
    if machine not in _REFUSED:
        return None

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    refuse = [step(_RETURN, _ERRNO | errno.EPERM)]
    steps = [
        step(_LOAD, 4), step(_EQUAL, _ARCHITECTURE[machine], 1, 0), step(_RETURN, _KILL),
        step(_LOAD, 0), step(_ATLEAST, 0x40000000, 0, 1), step(_RETURN, _KILL),  # x32 has numbers of its own
        step(_EQUAL, _CLONE3, 0, 1), step(_RETURN, _ERRNO | errno.ENOSYS),  # its flags lie in memory: use clone
        step(_EQUAL, _CLONE[machine], 0, 3), step(_LOAD, 16), step(_SET, _NEW_ANY & ~0x80, 0, 1), *refuse,
        step(_LOAD, 0),
    ]
    for number in _REFUSED[machine]:
        steps += [step(_EQUAL, number, 0, 1), *refuse]
    return b"".join([*steps, step(_RETURN, _ALLOW)])


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process now."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc(), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")

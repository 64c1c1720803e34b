"""The sandbox's system calls: namespaces, mounts, Landlock, capabilities, seccomp.

Thin wrappers over system calls by ``ctypes``; every one raises ``OSError`` with the call's name.
Numbers and constants are those of x86-64 (linux/uapi headers); other machines are refused.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2

_SYS_PIVOT_ROOT, _SYS_CAPSET, _SYS_SECCOMP = 155, 126, 317
_SYS_MOUNT_SETATTR = 442
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_SIGKILL = 9

# Landlock's file system rights: execute, write_file, read_file, read_dir; then those that remove,
# make, refer (since version 2), truncate (3) and call ioctl on devices (5).
READ_RIGHTS = 1 << 2 | 1 << 3
_LAST_FS_RIGHT = {1: 12, 2: 13, 3: 14, 4: 14}
_LATEST_FS_RIGHT = 15
_NET_RIGHTS = 0b11  # bind and connect by TCP, since version 4
_SCOPES = 0b11  # abstract unix sockets and signals, since version 6


def check_machine() -> None:
    """Raise ``OSError`` unless this machine is x86-64 Linux, whose numbers these are."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise OSError(f"the sandbox is for Linux on x86-64, not {platform.machine()}")


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _syscall(call: str, number: int, *arguments: object) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *converted), call)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode())
    call = f"mount {kind or source} on {target}"
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()), call)


def bind(source: str, target: str) -> None:
    mount(source, target, "", MS_BIND | MS_REC)


def make_read_only(target: str) -> None:
    """Make a mount and those below it read-only, without set-user-ID programs."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    call = f"mount_setattr {target}"
    _syscall(
        call, _SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, 32
    )  # fmt: skip


def unmount(target: str) -> None:
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    _syscall("pivot_root", _SYS_PIVOT_ROOT, new.encode(), old.encode())


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends. Call it after any setuid."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl")


def forbid_new_privileges() -> None:
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def drop_capabilities() -> None:
    """Give up every capability, also those that could be had back."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # past the last one, or not ours to drop
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _syscall("capset", _SYS_CAPSET, header, nothing)


def landlock_version() -> int:
    """Return the version of Landlock that the kernel offers, 0 if none."""
    try:
        return _syscall("landlock", _SYS_LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return 0


def make_landlock_rules(read: Sequence[str], write: Sequence[str]) -> int:
    """Return a file descriptor for: read below ``read``, everything below ``write``, no more."""
    version = landlock_version()
    fs_rights = (1 << _LAST_FS_RIGHT.get(version, _LATEST_FS_RIGHT) + 1) - 1
    attributes = struct.pack(
        "=QQQ", fs_rights, _NET_RIGHTS if version >= 4 else 0, _SCOPES if version >= 6 else 0
    )
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _syscall("landlock", _SYS_LANDLOCK_CREATE, attributes[:size], size, 0)
    for path in read:
        _allow_below(rules, path, READ_RIGHTS)
    for path in write:
        _allow_below(rules, path, fs_rights & ~1)  # all but execute
    return rules


def _allow_below(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            rights &= 1 << 1 | 1 << 2  # a file can be written and read, nothing else
        rule = struct.pack("=Qi", rights, place)
        _syscall(f"landlock {path}", _SYS_LANDLOCK_ADD, rules, 1, rule, 0)
    finally:
        os.close(place)


def apply_landlock(rules: int) -> None:
    _syscall("landlock", _SYS_LANDLOCK_RESTRICT, rules, 0)


def apply_seccomp(program: bytes) -> None:
    """Install a filter compiled by ``rewards.sandbox.seccomp``; it cannot be removed."""
    code = ctypes.create_string_buffer(program, len(program))
    filter_pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _syscall("seccomp", _SYS_SECCOMP, 1, 0, filter_pointer)

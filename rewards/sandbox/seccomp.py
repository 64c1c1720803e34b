"""Which system calls a judged program may make: a seccomp filter as classic BPF, for x86-64.

A list of what is allowed; everything else fails with EPERM, so that a program sees an ordinary
error. What CPython needs to compute, to use threads and to work on files of its own is there.
Missing on purpose: sockets, starting programs, signals to others (``fcntl`` can have the kernel
send some), other processes' memory and limits, namespaces and mounts, io_uring, bpf, keys, System V
IPC, memfd (memory beside the limit), locks that outlive or leave a process, and changes of modes,
owners, times and attributes (which Landlock does not cover).
"""

import errno
import functools
import struct
from collections.abc import Sequence

_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_LOAD, _AND, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = (
    0x20, 0x54, 0x15, 0x35, 0x45, 0x06,
)  # fmt: skip
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16

# Calls newer than this list are "not implemented", so that the C library falls back to older ones.
_FIRST_NEW_CALL = 424

_CLONE_THREAD, _CLONE_NEW_ANYTHING = 0x00010000, 0x7E020080
_AF_UNIX = 1

ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
    "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19,
    "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25,
    "msync": 26, "mincore": 27, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34,
    "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39,
    "sendfile": 40, "recvfrom": 45, "recvmsg": 47, "shutdown": 48, "getsockname": 51,
    "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "exit": 60, "wait4": 61, "uname": 63,
    "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents": 78,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85,
    "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "umask": 95, "gettimeofday": 96,
    "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115,
    "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "statfs": 137,
    "fstatfs": 138, "getpriority": 140, "arch_prctl": 158, "gettid": 186, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219,
    "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "waitid": 247, "openat": 257,
    "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265,
    "symlinkat": 266, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "get_robust_list": 274, "epoll_pwait": 281, "fallocate": 285,
    "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295,
    "pwritev": 296, "getcpu": 309, "renameat2": 316, "getrandom": 318, "membarrier": 324,
    "copy_file_range": 326, "statx": 332, "rseq": 334, "close_range": 436, "faccessat2": 439,
    "epoll_pwait2": 441,
}  # fmt: skip

_IOCTL, _CLONE, _FORK, _VFORK, _KILL_CALL, _TGKILL = 16, 56, 57, 58, 62, 234
_SENDTO, _SOCKETPAIR, _PRCTL, _PRLIMIT, _CLONE3, _FCNTL = 44, 53, 157, 302, 435, 72
# tcgetattr, window size, bytes waiting, blocking mode, close-on-exec: what asks or is harmless.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_PRCTLS = (15, 16)  # a thread's name
# Duplicates, close-on-exec, flags, locks of one's own, a pipe's size, seals. Not F_SETOWN, F_SETSIG
# and the like, by which the kernel signals whomever the caller names.
_FCNTLS = (0, 1, 2, 3, 5, 6, 7, 1030, 1031, 1032, 1034)
_F_SETFL, _O_ASYNC = 4, 0x2000

Instruction = tuple[int, int, int, int]


@functools.cache  # in a process namespace the pid is always 1
def build_filter(pid: int, may_fork: bool = False) -> bytes:
    """Return the filter for the process ``pid`` (as itself sees it), as ``struct sock_filter[]``.

    Signals may go to the process itself only. ``may_fork`` allows child processes, and signals to
    all that it can see; not to be used outside a process namespace.
    """
    rules = [_when(number, [_return(_ALLOW)]) for number in ALLOWED.values()]
    rules += [
        _when(_IOCTL, _allow_if_equal(1, _IOCTLS)),
        _when(_FCNTL, _allow_fcntl()),
        _when(_PRCTL, _allow_if_equal(0, _PRCTLS)),
        _when(_PRLIMIT, _allow_if_equal(0, (0,))),  # its own limits
        _when(_SOCKETPAIR, _allow_if_equal(0, (_AF_UNIX,))),
        # Without an address: a datagram socket must not reach a service of the machine.
        _when(_SENDTO, _allow_if_equal(4, (0,), wide=True)),
        _when(_CLONE, _allow_clone(may_fork)),
        _when(_CLONE3, [_return(_ERRNO | errno.ENOSYS)]),  # its flags lie in memory; use clone
    ]
    if may_fork:
        rules += [_when(number, [_return(_ALLOW)]) for number in (_FORK, _VFORK)]
        rules += [_when(number, [_return(_ALLOW)]) for number in (_KILL_CALL, _TGKILL)]
    else:
        rules += [_when(call, _allow_if_equal(0, (pid,))) for call in (_KILL_CALL, _TGKILL)]
    program = [
        _load(_ARCH_AT),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        _return(_KILL),
        _load(_NR_AT),
        (_JUMP_AT_LEAST, 0, 1, _X32_BIT),
        _return(_KILL),
        *(instruction for rule in rules for instruction in rule),
        (_JUMP_AT_LEAST, 0, 1, _FIRST_NEW_CALL),
        _return(_ERRNO | errno.ENOSYS),
        _return(_ERRNO | errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _return(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _when(number: int, block: Sequence[Instruction]) -> list[Instruction]:
    """The instructions of ``block``, which returns, for one system call; skipped for others."""
    return [(_JUMP_EQUAL, 0, len(block), number), *block]


def _allow_if_equal(argument: int, values: Sequence[int], wide: bool = False) -> list[Instruction]:
    """Allow the call if an argument has one of the values; ``wide``: in all of its 64 bits."""
    low = _ARGUMENTS_AT + 8 * argument
    block = []
    if wide:
        block += [_load(low + 4), (_JUMP_EQUAL, 1, 0, 0), _return(_ERRNO | errno.EPERM)]
    block.append(_load(low))
    for value in values:
        block += [(_JUMP_EQUAL, 0, 1, value), _return(_ALLOW)]
    return [*block, _return(_ERRNO | errno.EPERM)]


def _allow_fcntl() -> list[Instruction]:
    flags = [_load(_ARGUMENTS_AT + 16), (_JUMP_ANY_BIT, 0, 1, _O_ASYNC)]
    flags += [_return(_ERRNO | errno.EPERM), _return(_ALLOW)]
    others = _allow_if_equal(1, _FCNTLS)
    return [_load(_ARGUMENTS_AT + 8), (_JUMP_EQUAL, 0, len(flags), _F_SETFL), *flags, *others]


def _allow_clone(may_fork: bool) -> list[Instruction]:
    denied = _return(_ERRNO | errno.EPERM)
    block = [_load(_ARGUMENTS_AT), (_JUMP_ANY_BIT, 0, 1, _CLONE_NEW_ANYTHING), denied]
    if not may_fork:
        block += [(_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD), denied]
    return [*block, _return(_ALLOW)]

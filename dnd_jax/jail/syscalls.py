"""The system calls that generated code may make, as a seccomp filter: what isn't named here is refused. Standard library only.

Not named, so refused: sockets, new processes and programs, signals, tracing, mounts, shared memory, io_uring, whatever changes
owners, modes, times, links or folders, and all calls that newer kernels add. Three are allowed by their arguments.
"""

import ctypes
import errno
import os
import struct

# Of Linux's unistd.h; the two architectures number the same calls differently, and the older one has more of them.
X86_64 = """
read=0 write=1 close=3 fstat=5 stat=4 lstat=6 newfstatat=262 statx=332 poll=7 ppoll=271 lseek=8 mmap=9 mprotect=10 munmap=11
mremap=25 msync=26 mincore=27 madvise=28 brk=12 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 rt_sigpending=127
rt_sigtimedwait=128 rt_sigsuspend=130 sigaltstack=131 ioctl=16 pread64=17 pwrite64=18 readv=19 writev=20 preadv=295 pwritev=296
access=21 faccessat=269 faccessat2=439 pipe=22 pipe2=293 select=23 pselect6=270 sched_yield=24 dup=32 dup2=33 dup3=292
nanosleep=35 clock_nanosleep=230 clock_gettime=228 clock_getres=229 getitimer=36 setitimer=38 alarm=37 pause=34 getpid=39
gettid=186 getppid=110 getpgrp=111 getpgid=121 getsid=124 getuid=102 geteuid=107 getgid=104 getegid=108 getgroups=115
getresuid=118 getresgid=120 uname=63 fsync=74 fdatasync=75 truncate=76 ftruncate=77 getdents64=217 getcwd=79 chdir=80 fchdir=81
rename=82 renameat=264 renameat2=316 unlink=87 unlinkat=263 open=2 openat=257 openat2=437 readlink=89 readlinkat=267 umask=95
gettimeofday=96 time=201 getrlimit=97 getrusage=98 sysinfo=99 times=100 statfs=137 fstatfs=138 arch_prctl=158 futex=202
sched_getaffinity=204 sched_getparam=143 sched_getscheduler=145 sched_get_priority_max=146 sched_get_priority_min=147
set_tid_address=218 set_robust_list=273 get_robust_list=274 epoll_create=213 epoll_create1=291 epoll_ctl=233 epoll_wait=232
epoll_pwait=281 eventfd2=290 timerfd_create=283 timerfd_settime=286 timerfd_gettime=287 exit=60 exit_group=231 wait4=61
waitid=247 getrandom=318 rseq=334 membarrier=324 getcpu=309 restart_syscall=219 close_range=436 fadvise64=221
clone=56 fcntl=72 prlimit64=302 clone3=435
"""
AARCH64 = """
read=63 write=64 close=57 fstat=80 newfstatat=79 statx=291 ppoll=73 lseek=62 mmap=222 mprotect=226 munmap=215 mremap=216
msync=227 mincore=232 madvise=233 brk=214 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 rt_sigpending=136
rt_sigtimedwait=137 rt_sigsuspend=133 sigaltstack=132 ioctl=29 pread64=67 pwrite64=68 readv=65 writev=66 preadv=69 pwritev=70
faccessat=48 faccessat2=439 pipe2=59 pselect6=72 sched_yield=124 dup=23 dup3=24 nanosleep=101 clock_nanosleep=115
clock_gettime=113 clock_getres=114 getitimer=102 setitimer=103 getpid=172 gettid=178 getppid=173 getpgid=155 getsid=156
getuid=174 geteuid=175 getgid=176 getegid=177 getgroups=158 getresuid=148 getresgid=150 uname=160 fsync=82 fdatasync=83
truncate=45 ftruncate=46 getdents64=61 getcwd=17 chdir=49 fchdir=50 renameat=38 renameat2=276 unlinkat=35 openat=56 openat2=437
readlinkat=78 umask=166 gettimeofday=169 getrlimit=163 getrusage=165 sysinfo=179 times=153 statfs=43 fstatfs=44 futex=98
sched_getaffinity=123 sched_getparam=121 sched_getscheduler=120 sched_get_priority_max=125 sched_get_priority_min=126
set_tid_address=96 set_robust_list=99 get_robust_list=100 epoll_create1=20 epoll_ctl=21 epoll_pwait=22 eventfd2=19
timerfd_create=85 timerfd_settime=86 timerfd_gettime=87 exit=93 exit_group=94 wait4=260 waitid=95 getrandom=278 rseq=293
membarrier=283 getcpu=168 restart_syscall=128 close_range=436 fadvise64=223
clone=220 fcntl=25 prlimit64=261 clone3=435
"""
TABLES = {"x86_64": (0xC000003E, X86_64), "aarch64": (0xC00000B7, AARCH64)}  # audit numbers of the architectures

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
ALLOW, REFUSE, ABSENT, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in the kernel's seccomp_data
X32 = 0x40000000  # the bit of a second numbering on x86_64
CLONE_THREAD = 0x00010000
SET_OWNER, SET_SIGNAL, SET_OWNER_EX = 8, 10, 15  # by which fcntl sends signals to others
NO_NEW_PRIVILEGES, SECCOMP, BY_FILTER = 38, 22, 2


def restrict() -> None:
    """Refuse this process all but the named system calls from now on; raise OSError where the kernel can't."""
    machine = os.uname().machine
    if machine not in TABLES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}, only for {sorted(TABLES)}")
    audit, table = TABLES[machine]
    numbers = {name: int(number) for name, _, number in (entry.partition("=") for entry in table.split())}
    code = b"".join(struct.pack("=HBBI", *step) for step in _program(audit, numbers))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(SECCOMP, BY_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel has no seccomp filters")


def _program(audit: int, numbers: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """Return the filter: operation, instructions to skip if true and if false, constant."""
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL),
             (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    # threads but no processes; clone3, whose flags lie in memory, is absent, so that libc takes clone
    steps += _if(numbers.pop("clone"), [_argument(0), (ANY_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW)])
    steps += _if(numbers.pop("clone3"), [(RETURN, 0, 0, ABSENT)])
    owners = [(EQUAL, 3, 0, SET_OWNER), (EQUAL, 2, 0, SET_SIGNAL), (EQUAL, 1, 0, SET_OWNER_EX)]
    steps += _if(numbers.pop("fcntl"), [_argument(1), *owners, (RETURN, 0, 0, ALLOW)])
    steps += _if(numbers.pop("prlimit64"), [_argument(0), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW)])  # its own limits
    for number in numbers.values():
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    return [*steps, (RETURN, 0, 0, REFUSE)]


def _if(number: int, steps: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Return steps for one call only, which end in a refusal."""
    return [(EQUAL, 0, len(steps) + 1, number), *steps, (RETURN, 0, 0, REFUSE)]


def _argument(index: int) -> tuple[int, int, int, int]:
    return LOAD, 0, 0, ARGUMENTS + 8 * index  # its lower half; both architectures are little-endian

"""Seccomp filter of the system calls that a sandboxed program may not make.

It closes what namespaces and limits leave open: System V memory counts against no limit, keys and
tracing cross namespaces, and the others lead to new privileges. A refused call fails with EPERM.
"""

from __future__ import annotations

import ctypes
import os

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_RET_KILL, _RET_ERRNO, _RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM = 1
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_X32_CALLS = 0x40000000  # the numbers of x86-64's second calling convention begin here

_AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS = {
    # name: (x86_64, aarch64)
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
}


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    )


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def refuse_system_calls() -> None:
    """Install the filter; the process must have set `no_new_privs`.

    Raises:
        OSError: If the kernel rejects the filter, or the architecture is not x86_64 or aarch64.
    """
    machine = os.uname().machine
    if machine not in _AUDIT_ARCHITECTURES:
        raise OSError(f"the system calls of {machine} are not known here")
    column = list(_AUDIT_ARCHITECTURES).index(machine)
    numbers = [pair[column] for pair in _NUMBERS.values()]
    refuse = _Instruction(_RETURN, 0, 0, _RET_ERRNO | _EPERM)
    program = [
        _Instruction(_LOAD, 0, 0, 4),  # the calling convention; another one ends the process
        _Instruction(_JUMP_EQUAL, 1, 0, _AUDIT_ARCHITECTURES[machine]),
        _Instruction(_RETURN, 0, 0, _RET_KILL),
        _Instruction(_LOAD, 0, 0, 0),  # the number of the call
        _Instruction(_JUMP_AT_LEAST, len(numbers) + 1, 0, _X32_CALLS),
    ]
    for place, number in enumerate(numbers):
        program.append(_Instruction(_JUMP_EQUAL, len(numbers) - place, 0, number))
    program += [_Instruction(_RETURN, 0, 0, _RET_ALLOW), refuse]
    instructions = (_Instruction * len(program))(*program)
    filter_program = _Filter(len(program), instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

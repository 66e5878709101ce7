"""A program that runs against every wall from within; the tests name the first that gives way."""

from __future__ import annotations

from wegeft_cli.sandbox.isolation import Limits
from wegeft_cli.sandbox.run import Program

_ATTEMPTS = """
import ctypes, os, resource, socket, sys

libc = ctypes.CDLL(None, use_errno=True)

def refused(call, *kinds):
    try:
        call()
    except kinds:
        return True
    return False

def try_user():
    return [libc.unshare(0x10000000) < 0, libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) < 0,
            refused(lambda: os.setuid(0), OSError) or os.getuid() == 0 and libc.chroot(b"/") < 0]

def try_mount():
    places = ["/", *[p for p in sys.path if os.path.isdir(p)]]
    writes = [refused(lambda p=p: open(p + "/wegeft-attempt", "w"), OSError) for p in places]
    hidden = [not os.path.exists(p) for p in ("/proc", "/sys", "/var", "/run", "/etc/passwd")]
    return [*writes, *hidden, os.listdir("/tmp") == []]

def try_net():
    def connect():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect(("192.0.2.1", 9))
    return [refused(connect, OSError), [name for _, name in socket.if_nameindex()] == ["lo"]]

def try_pid():
    return [os.getpid() == 1, os.getppid() == 0]

def try_syscalls():
    return [libc.shmget(0, 4096, 0o1600) < 0, libc.msgget(0, 0o1600) < 0]

def try_environment():
    return [not os.environ]

def try_memory(limit):
    return [refused(lambda: bytearray(limit), MemoryError)]

def try_files(limit):
    def write():
        with open("/tmp/long", "wb", buffering=0) as f:
            while f.tell() <= limit:
                f.write(bytes(65536))
    done = refused(write, OSError)
    os.unlink("/tmp/long")
    return [done]

def try_processes(limit):
    children, full = [], False
    for _ in range(limit + 1):
        try:
            child = os.fork()
        except OSError:
            full = True
            break
        if child == 0:
            import time
            time.sleep(60)
            os._exit(0)
        children.append(child)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return [full]

def attempt(wall, *arguments):
    return globals()["try_" + wall](*arguments)
"""

_TESTS = """
def check(candidate):
    for wall, *arguments in WALLS:
        held = candidate(wall, *arguments)
        assert held and all(h is True for h in held), f"{{wall}}: it does not hold ({{held}})"

WALLS = {walls!r}
"""


def as_program(limits: Limits) -> Program:
    """The attempts as a program that passes where every wall holds.

    Args:
        limits: Those of the sandbox.

    Returns:
        The program; its tests fail with the wall's name.
    """
    walls = [
        ("user",),
        ("mount",),
        ("net",),
        ("pid",),
        ("syscalls",),
        ("environment",),
        ("memory", limits.memory_bytes),
        ("files", limits.file_bytes),
        ("processes", limits.processes),
    ]
    return Program(_ATTEMPTS, "", _TESTS.format(walls=walls), "attempt")

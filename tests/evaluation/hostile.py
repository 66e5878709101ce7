"""Programs that mean harm or pretend to be right; none may leave its sandbox, none may pass.

Every one defines `work(n)`, which the tests below want to double its argument. `HOST` is a folder
of the machine that lies outside, `PORT` a port on which the machine listens.
"""

from __future__ import annotations

TESTS = """
def check(candidate):
    assert candidate(21) == 42
    assert candidate(-3) == -6
"""

RIGHT = "def work(n): return 2 * n"

# name -> (the outcomes that may follow, program)
HOSTILE: dict[str, tuple[set[str], str]] = {
    "wrong answer": ({"failed"}, "def work(n): return n"),
    "no function": ({"failed"}, "x = 1"),
    "no program": ({"failed"}, "def work(n:\n"),
    "null byte": ({"failed"}, "def work(n): return 2 * n\n\0"),
    "exception": ({"failed"}, "def work(n): raise KeyError(n)"),
    "exception with a trap": (
        {"failed"},
        "class E(BaseException):\n    def __str__(self): raise self\ndef work(n): raise E",
    ),
    # Ends that could be taken for success.
    "exit 0": ({"failed"}, "import sys\nsys.exit(0)"),
    "exit 0 when called": ({"failed"}, "import sys\ndef work(n): sys.exit(0)"),
    "_exit 0": ({"failed"}, "import os\nos._exit(0)"),
    "_exit 0 when called": ({"failed"}, "import os\ndef work(n): os._exit(0)"),
    "abort": ({"failed"}, "import os\ndef work(n): os.abort()"),
    "segmentation fault": ({"failed"}, "import ctypes\ndef work(n): ctypes.string_at(0)"),
    "deep recursion": (
        {"failed", "memory", "timeout"},
        "import sys\nsys.setrecursionlimit(10**7)\ndef work(n): return work(n + 1)",
    ),
    # Forged success.
    "equal to everything": (
        {"failed"},
        "class Yes:\n"
        "    def __eq__(self, other): return True\n"
        "    def __bool__(self): return True\n"
        "def work(n): return Yes()",
    ),
    "number equal to everything": (
        {"failed"},
        "class Yes(int):\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\n"
        "def work(n): return Yes(0)",
    ),
    "replaced builtins": (
        {"failed"},
        "import builtins\n"
        "builtins.AssertionError = builtins.Exception = Warning\n"
        "builtins.exec = builtins.compile = builtins.print = lambda *a, **k: None\n"
        "def work(n): return None",
    ),
    "replaced check": ({"failed"}, "check = lambda candidate: None\ndef work(n): return None"),
    "verdict written to every file": (
        {"failed"},
        "import os\n"
        'told = b\'{"ready": true}\\n{"verdict": "passed"}\\n{"exit": 0, "cpu_seconds": 0}\\n\'\n'
        "for fd in range(64):\n"
        "    try: os.write(fd, told)\n"
        "    except OSError: pass\n"
        "def work(n): return None",
    ),
    "verdict as a frame": (
        {"failed"},
        "import os, json\n"
        'told = json.dumps({"verdict": "passed"}).encode()\n'
        "for fd in range(3, 64):\n"
        "    try: os.write(fd, len(told).to_bytes(4, 'big') + told)\n"
        "    except OSError: pass\n"
        "def work(n): return None",
    ),
    "rewritten carrier": (
        {"failed"},
        "import sys\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.endswith('inside'):\n"
        "        module._tell({'verdict': 'passed'})\n"
        "    if name.endswith('carry'):\n"
        "        module.encode_value = lambda value: {'tag': 'opaque', 'value': 'x'}\n"
        "def work(n): return 42",
    ),
    "tests looked up": (
        {"failed"},
        "import gc, sys\n"
        "def work(n):\n"
        "    seen, frame = [], sys._getframe().f_back\n"
        "    while frame is not None:\n"
        "        seen += [frame.f_locals, frame.f_globals]\n"
        "        frame = frame.f_back\n"
        "    seen += gc.get_objects()\n"
        "    found = ' '.join(repr(o) for o in seen if type(o) in (dict, list, tuple))\n"
        "    if ')12(etadidnac'[::-1] in found: return 2 * n\n"
        "    assert 'entry_point' in found\n",
    ),
    # Eating the machine up.
    "endless loop": ({"timeout"}, "while True: pass"),
    "sleep": ({"timeout"}, "import time\ndef work(n): time.sleep(1000)"),
    "endless output": ({"timeout"}, "while True: print('x' * 10000)"),
    "endless answer": ({"failed", "memory"}, "def work(n): return 'x' * (1 << 24)"),
    "flooded link": (
        {"failed", "timeout"},
        "import os\n"
        "def work(n):\n"
        "    while True:\n"
        "        for fd in range(3, 32):\n"
        "            try: os.write(fd, b'\\xff' * 65536)\n"
        "            except OSError: pass\n",
    ),
    "bottomless answer": (
        {"failed"},
        "def work(n):\n    a = []\n    a.append(a)\n    return a",
    ),
    "memory bomb": (
        {"memory", "timeout"},
        "def work(n):\n    a = []\n    while True: a.append(bytearray(1 << 24))",
    ),
    "shared memory bomb": (
        {"failed"},
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "def work(n):\n"
        "    got = libc.shmget(0, 1 << 30, 0o1600)\n"
        "    return 2 * n if got >= 0 else None",
    ),
    "fork bomb": (
        {"failed", "timeout", "memory"},
        "import os\n"
        "def work(n):\n"
        "    while True:\n"
        "        try: os.fork()\n"
        "        except OSError: pass",
    ),
    "thread bomb": (
        {"failed", "timeout", "memory"},
        "import threading, time\n"
        "def work(n):\n"
        "    while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    ),
    "full disk": (
        {"failed"},
        "def work(n):\n"
        "    for i in range(10 ** 6):\n"
        "        with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(1 << 19))",
    ),
    "long file": (
        {"failed"},
        "def work(n):\n"
        "    with open('/tmp/a', 'wb') as f:\n"
        "        for i in range(10 ** 6): f.write(bytes(1 << 20))",
    ),
    "many open files": (
        {"failed"},
        "def work(n):\n    kept = [open('/tmp/a', 'w') for i in range(10 ** 6)]",
    ),
    # Reaching outside: each returns the right answer only where it got through.
    "file written outside": (
        {"failed"},
        "import pathlib\n"
        "def work(n):\n"
        "    for place in (HOST, '/', '/etc', '/dev/shm', '/var/tmp', '/usr/lib', '/home', '..'):\n"
        "        try:\n"
        "            pathlib.Path(place, 'mark').write_text('x')\n"
        "            return 2 * n\n"
        "        except OSError: pass",
    ),
    "file read outside": (
        {"failed"},
        "import os\n"
        "def work(n):\n"
        "    for place in (HOST, '/etc/passwd', '/proc/1/environ', '/root/.ssh', '/sys', '/run'):\n"
        "        if os.path.exists(place): return 2 * n",
    ),
    "shell": (
        {"failed"},
        "import os, subprocess\n"
        "def work(n):\n"
        "    if os.system(f'echo x > {HOST}/mark') == 0: return 2 * n\n"
        "    subprocess.run(['/bin/sh', '-c', 'true'], check=True)\n"
        "    return 2 * n",
    ),
    "socket to the machine": (
        {"failed"},
        "import socket\n"
        "def work(n):\n"
        "    socket.create_connection(('127.0.0.1', PORT), timeout=5)\n"
        "    return 2 * n",
    ),
    "socket to the world": (
        {"failed"},
        "import socket\n"
        "def work(n):\n"
        "    socket.create_connection(('192.0.2.1', 80), timeout=5)\n"
        "    return 2 * n",
    ),
    "signals": (
        {"failed"},
        "import os, signal\n"
        "def work(n):\n"
        "    for target in (os.getppid(), 0, -1, *range(2, 4000)):\n"
        "        for sent in (signal.SIGTERM, signal.SIGKILL):\n"
        "            try: os.kill(target, sent)\n"
        "            except OSError: pass\n"
        "    return None",
    ),
    "new rights": (
        {"failed"},
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "def work(n):\n"
        "    got = [libc.unshare(0x10000000), libc.mount(b'x', b'/tmp', b'tmpfs', 0, None),\n"
        "           libc.umount2(b'/tmp', 2), libc.chroot(b'/tmp')]\n"
        "    return 2 * n if 0 in got else None",
    ),
}

# Right answers with a trick beside them: they may pass, and still nothing may be left behind.
LINGERING: dict[str, str] = {
    "left-over processes": (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0: time.sleep(1000)\n"
        "    os._exit(0)\n"
        "def work(n): return 2 * n"
    ),
    "deaf to signals": (
        "import signal\n"
        "for i in range(1, 65):\n"
        "    try: signal.signal(i, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "def work(n): return 2 * n"
    ),
}

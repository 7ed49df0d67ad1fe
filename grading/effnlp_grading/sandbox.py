"""The room in which submissions run: bubblewrap around a warm parent that forks a session for each.

What is in it: the system's programs and libraries, Python's, and the kit without what would answer (masks), all
read-only; no network; nothing of the instructor's files or environment. Each session has further walls of its own
(`inside/walls.py`). `Unconfined` is the same without any of it, for a machine on which there can be no sandbox.
"""

from __future__ import annotations

import array
import ast
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from effnlp_grading.inside.walls import PRIVATE_FOLDERS, SCRATCH, Walls
from effnlp_grading.limits import DEFENCES, Limits
from effnlp_grading.masks import ABSENT, KIT, kit_masks, library_masks, masked_modules
from effnlp_lab import exercises
from effnlp_lab.errors import UsageError

START_SECONDS = 120.0
INSIDE = Path(__file__).with_name("inside")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/ld.so.conf",
          "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")
GPU_LIBRARIES = ("/sys", "/opt/nvidia", "/run/nvidia", "/etc/nvidia")
KEPT_VARIABLES = ("LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
                  "EFFNLP_DEVICE", "EFFNLP_FAST", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH",
                  "CUDA_HOME", "CC", "TORCHDYNAMO_DISABLE")
WHERE_CLOSED = (
    "as root of the machine; or allow user namespaces (`sysctl -w user.max_user_namespaces=15000`, and on Ubuntu "
    "`sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`; in a pod: `hostUsers: false`, or "
    "`securityContext: {capabilities: {add: [SYS_ADMIN]}}`)"
)


class SandboxError(UsageError):
    """There can be no sandbox here; the sentence says why and what to do."""


@dataclass
class Session:
    """One running submission: the proctor's end of its socket, and its processes as this machine numbers them."""

    channel: socket.socket
    first: int  # process 1 of its process space
    student: int  # where its cells run
    folder: tempfile.TemporaryDirectory | None = None
    handles: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for process in (self.first, self.student):  # a number may be another process's when the session ends
            with contextlib.suppress(ProcessLookupError):
                self.handles.append(os.pidfd_open(process))

    def end(self) -> None:
        """End all of its processes."""
        while self.handles:
            handle = self.handles.pop(0)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
        self.channel.close()
        if self.folder is not None:
            self.folder.cleanup()


class Sandbox(contextlib.AbstractContextManager):
    """`with Sandbox("01_tokenization") as sandbox: session = sandbox.spawn(limits)`. One serves many submissions.

    Raises SandboxError where bubblewrap is absent or may not do its work. `defences` can be reduced by tests alone.
    """

    name = "bubblewrap"

    def __init__(self, lab: str, device: str = "cpu", defences: frozenset[str] = DEFENCES) -> None:
        self.lab, self.device, self.defences = lab, device, defences
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @property
    def confined(self) -> bool:
        return True

    def start(self) -> None:
        """Start the warm parent, if it is not running."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        if self.confined and (closed := _closed_folder()):
            raise SandboxError(f"{closed} is closed to other users, and root's sandbox runs submissions as one: they "
                               f"could not import what lies there. `chmod a+rx {closed}` opens it.")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = log = self._stack.enter_context(tempfile.TemporaryFile())
        with theirs:
            self._process = subprocess.Popen(
                self._command(theirs.fileno()), pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=self._environment(), cwd="/", start_new_session=True)
        self._control = ours
        readable, _, _ = select.select([ours], [], [], START_SECONDS)
        if not readable or ours.recv(64) != b"ready":
            said = self._last_words()
            self.close()
            raise SandboxError(self._refusal(said))

    def spawn(self, limits: Limits, memory: int | None = None) -> Session:
        """Fork a session for one submission; `memory` replaces its limit of memory, and is held to closely."""
        with self._lock:
            self.start()
            ours, theirs = socket.socketpair()
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            ours.settimeout(START_SECONDS)
            folder = None if self.confined else tempfile.TemporaryDirectory(prefix="effnlp-grade-")
            request = {"walls": asdict(self._walls(limits, memory)), "confined": self.confined,
                       "tight": memory is not None, "folder": folder and folder.name}
            try:
                with theirs:
                    socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno()])
                return Session(ours, _sender(ours, b"1"), _sender(ours, b"2"), folder)
            except OSError as error:
                ours.close()
                raise SandboxError(self._refusal(f"no session began: {error}: {self._last_words()}")) from error

    def close(self) -> None:
        """End the warm parent and every session."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._stack.close()

    @staticmethod
    def program() -> str:
        """Where bubblewrap is. Raises SandboxError where it is not."""
        found = os.environ.get("EFFNLP_BWRAP") or shutil.which("bwrap")
        if found is None:
            raise SandboxError(
                "Submissions run in a sandbox, and bubblewrap (`bwrap`) is not on PATH: `apt-get install bubblewrap`, "
                "or grade without a sandbox (`--no-sandbox`), where students' code can do all that you can.")
        return found

    @property
    def warm_parent(self) -> int | None:
        """The process id of bubblewrap, or of the warm parent without it; None where none runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def _last_words(self) -> str:
        """The last line that bubblewrap or the warm parent wrote."""
        self._log.seek(0)
        said = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return said[-1] if said else "it said nothing"

    def _walls(self, limits: Limits, memory: int | None) -> Walls:
        held = self.defences
        return Walls(
            memory=(memory or limits.memory) if "memory" in held and self.device == "cpu" else 1 << 40,
            scratch=limits.scratch if "scratch" in held else 8 << 30,
            processes=limits.processes if "processes" in held else 4096,
            uid=60_000 + os.getpid() % 5_000, apart="spaces" in held, private="scratch" in held,
            filtered="calls" in held, kept=_folders_in_scratch())

    def _command(self, descriptor: int) -> list[str]:
        # without --die-with-parent: it would count a thread's end; the warm parent sees its socket's end instead
        command = [self.program(), "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
                   "--new-session", "--hostname", "sandbox"]
        if "network" in self.defences:
            command.append("--unshare-net")
        if os.getuid() == 0:
            command += ["--cap-drop", "ALL"]
            for capability in ("SYS_ADMIN", "SETUID", "SETGID", "SETPCAP", "KILL"):
                command += ["--cap-add", f"CAP_{capability}"]
        else:
            command += ["--unshare-user"]
        command += self._mounts()
        return [*command, *_warm(descriptor, self.lab)]

    def _mounts(self) -> list[str]:
        paths = list(dict.fromkeys([*SYSTEM, *map(str, _python_folders())]))
        arguments = ["--tmpfs", "/", "--perms", "1777", "--tmpfs", SCRATCH]
        for parent in dict.fromkeys(str(p) for path in paths for p in reversed(Path(path).parents) if p.name):
            if not parent.startswith("/usr") and parent != SCRATCH:  # bubblewrap's own would be closed to the session
                arguments += ["--perms", "0755", "--dir", parent]
        arguments += ["--perms", "0755", "--dir", "/kit"]
        for path in paths:
            arguments += ["--symlink", os.readlink(path), path] if os.path.islink(path) else \
                ["--ro-bind-try", path, path]
        for hidden in _own_folders():
            arguments += ["--tmpfs", str(hidden), "--remount-ro", str(hidden)]
        if "files" not in self.defences:  # the rest of the machine's folders, as they are
            taken = {Path(path).parts[1] for path in paths} | {"proc", "dev", "sys", "kit", "tmp"}
            for folder in sorted(p for p in Path("/").iterdir() if p.is_dir() and p.name not in taken):
                arguments += ["--bind", str(folder), str(folder)]
        arguments += ["--proc", "/proc", "--dev", "/dev"]
        for folder in PRIVATE_FOLDERS:
            if folder != SCRATCH:
                arguments += ["--perms", "1777", "--tmpfs", folder]
        arguments += ["--ro-bind", str(KIT), "/kit/effnlp_lab", "--ro-bind", str(INSIDE), "/kit/effnlp_inside"]
        arguments += ["--setenv", "PYTHONPATH", os.pathsep.join(["/kit", *map(str, _packages_elsewhere())])]
        if "masks" in self.defences:
            file, folder = self._nothing()
            for path, is_folder in kit_masks(self.lab):
                arguments += ["--ro-bind", str(folder if is_folder else file), f"/kit/effnlp_lab/{path}"]
            for path, is_folder in library_masks(self.lab):
                arguments += ["--ro-bind", str(folder if is_folder else file), str(path)]
        if self.device == "cuda":
            arguments += list(_gpu_mounts())
        return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/"]

    def _nothing(self) -> tuple[Path, Path]:
        """A file and a package that raise ModuleNotFoundError when they are imported."""
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="effnlp-masks-")))
        (place / "absent").mkdir()
        for path in (place / "absent.py", place / "absent" / "__init__.py"):
            path.write_text(ABSENT)
        for path in (place, place / "absent"):
            path.chmod(0o755)
        return place / "absent.py", place / "absent"

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        fixed = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp",
                 "USER": "student", "LOGNAME": "student", "PYTHONDONTWRITEBYTECODE": "1", "EFFNLP_GRADING": "1",
                 "EFFNLP_DEVICE": self.device, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                 "PYTHONHASHSEED": "0", "TMPDIR": "/tmp"}
        if self.device == "cuda":  # said outright: nobody has to look for a card before the fork
            fixed["TRITON_INTERPRET"] = "0"
        return {**(kept if "environment" in self.defences else os.environ), **fixed}

    def _refusal(self, said: str) -> str:
        return (f"bubblewrap cannot start a sandbox here ({said[:300]}): grade {WHERE_CLOSED}; or without a sandbox "
                "(`--no-sandbox`), where students' code can do all that you can.")


class Unconfined(Sandbox):
    """The same processes without any walls: students' code can do all that the instructor can."""

    name = "none"

    @property
    def confined(self) -> bool:
        return False

    def _command(self, descriptor: int) -> list[str]:
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="effnlp-inside-")))
        (place / "effnlp_inside").symlink_to(INSIDE)
        self._path = str(place)
        return _warm(descriptor, self.lab)

    def _environment(self) -> dict[str, str]:
        found = super()._environment()
        others = [path for path in sys.path if path and Path(path).is_dir()]
        path = os.pathsep.join([self._path, str(KIT.parent), *others])
        return {**found, "HOME": os.environ.get("HOME", "/tmp"), "PYTHONPATH": path}

    def _refusal(self, said: str) -> str:
        return f"The process in which submissions run did not start: {said[:300]}"


def open_sandbox(lab: str, device: str = "cpu", sandbox: bool = True) -> Sandbox:
    """A sandbox for a lab's submissions, or what stands for it where the instructor wants none."""
    return (Sandbox if sandbox else Unconfined)(lab, device)


@cache
def sandbox_error() -> str | None:
    """Why there can be no sandbox here, in a sentence; None where there can. Tried once, as one takes seconds."""
    try:
        with Sandbox(exercises.lab_names()[0]) as trial:
            trial.spawn(Limits()).end()
    except SandboxError as error:
        return str(error)
    return None


def _sender(channel: socket.socket, expected: bytes) -> int:
    """Read one byte; return the process that sent it, by the kernel's word."""
    size = struct.calcsize("3i")
    data, extra, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(size))
    if data != expected:
        raise OSError("the session ended while it began")
    for level, kind, content in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return array.array("i", content[:size])[0]
    raise OSError("the kernel named no sender")


def _warm(descriptor: int, lab: str) -> list[str]:
    return [sys.executable, "-P", "-m", "effnlp_inside.warm", str(descriptor), lab, *_imports_of(lab)]


@cache
def _imports_of(lab: str) -> tuple[str, ...]:
    """The modules that a lab's given cells import, for the warm parent to import once."""
    found = set()
    for node in ast.walk(ast.parse(exercises.sources(lab)["given"])):
        if isinstance(node, ast.Import):
            found.update(one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    hidden = masked_modules(lab)
    return tuple(sorted(name for name in found if not any(name == m or name.startswith(m + ".") for m in hidden)))


def _prefixes() -> list[Path]:
    return [Path(p) for p in dict.fromkeys((sys.prefix, sys.base_prefix, sys.exec_prefix))]


def _packages_elsewhere() -> list[Path]:
    """Folders on this process's path that hold packages and are not Python's own, as PYTHONPATH names them."""
    own = {Path(__file__).resolve().parents[1], KIT.parent}
    paths = dict.fromkeys(Path(p) for p in (*sys.path, *sysconfig.get_paths().values()) if p)
    return [p for p in paths if p.is_dir() and p.resolve() not in own
            and not any(p.is_relative_to(base) for base in (*_prefixes(), "/usr"))
            and next(p.glob("*.dist-info"), None) and not (p / "effnlp_lab").exists()]


def _python_folders() -> Iterator[Path]:
    """Where Python and its packages are: prefixes, and other folders on this process's path that hold packages."""
    for folder in [p for p in (*_prefixes(), *_packages_elsewhere()) if not p.is_relative_to("/usr")]:
        yield folder
        real = folder.resolve()
        if real != folder:
            yield real


def _closed_folder() -> Path | None:
    """The first of Python's folders that an ordinary user may not enter, where this process is root."""
    if os.getuid() != 0:
        return None
    return next((p for p in _python_folders() if p.is_dir() and p.stat().st_mode & 0o005 != 0o005), None)


def _folders_in_scratch() -> tuple[str, ...]:
    """Python's folders that lie in the scratch folders, outermost ones alone."""
    inside = sorted({str(p) for p in _python_folders() if any(p.is_relative_to(f) for f in PRIVATE_FOLDERS)})
    return tuple(p for p in inside if not any(p != q and Path(p).is_relative_to(q) for q in inside))


def _own_folders() -> Iterator[Path]:
    """An installed effnlp_lab or effnlp_grading within Python's folders, which must not be seen there."""
    for folder in (KIT, Path(__file__).resolve().parent):
        if any(folder.is_relative_to(base) for base in ("/usr", *_python_folders())):
            yield folder


def _gpu_mounts() -> Iterator[str]:
    """The card's device nodes and the folders of its driver."""
    for node in sorted([*Path("/dev").glob("nvidia*"), Path("/dev/dri")]):
        if node.exists():
            yield from ("--dev-bind", str(node), str(node))
    for path in GPU_LIBRARIES:
        yield from ("--ro-bind-try", path, path)
    for path in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        yield from ("--ro-bind-try", path, path)
    compiler = Path(os.environ.get("CC") or shutil.which("gcc") or "/usr/bin/gcc")  # Triton's, for what starts a kernel
    if compiler.is_absolute() and not compiler.is_relative_to("/usr"):
        yield from ("--ro-bind-try", str(compiler.parents[1]), str(compiler.parents[1]))

"""Images, built from Dockerfiles without Docker and without a registry.

`isthmus:0.1.0` is built by the steps of the project's own Dockerfile, as they stand there. The
others are in lab/kube/docker. What differs from a build by Docker is the base alone:
`python:3.13-slim-trixie` comes from a registry, and is put together here from Debian's packages
(base.py).
"""

import hashlib
import os
import shlex
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.kube import base, dockerfile
from lab.kube.dockerfile import DockerfileError, Ignore, Step
from lab.kube.layers import Layer, Store, merged
from lab.process import LabError

# What a step sees of the machine, so that it reaches the same mirrors: none of it stays in the
# layer.
_PASSED = (
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "PIP_INDEX_URL",
    "PIP_DEFAULT_TIMEOUT",
)
_BOUND = ("/etc/resolv.conf", "/etc/hosts")
_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
_SHOWN = "/mnt/authorities.crt"  # where a step finds it, and who reads it
_TRUSTING = ("SSL_CERT_FILE", "PIP_CERT", "CARGO_HTTP_CAINFO", "CURL_CA_BUNDLE")
# Devices of its own, as in a container, so that a step that runs as root cannot remove those of the
# machine.
_DEVICES = """mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "$ROOT/dev/${node%:*}" c 1 "${node#*:}"
done
ln -s /proc/self/fd "$ROOT/dev/fd"
ln -s fd/0 "$ROOT/dev/stdin"
ln -s fd/1 "$ROOT/dev/stdout"
ln -s fd/2 "$ROOT/dev/stderr"
mkdir -m 1777 "$ROOT/dev/shm"
"""


@dataclass(slots=True)
class Built:
    """An image, or what a stage has of one: its layers, lowest first, and the configuration (OCI
    image specification, config.md)."""

    key: str
    layers: list[Layer] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    workdir: str = "/"
    user: str = ""

    def next(self, *parts: str) -> None:
        """Mix what a step is made of into the key."""
        self.key = fingerprint(self.key, *parts)

    def settings(self) -> dict[str, object]:
        """The configuration as an archive has it."""
        found = {
            **self.config,
            "WorkingDir": self.workdir,
            "Env": [f"{name}={value}" for name, value in self.env.items()],
        }
        return {**found, "User": self.user} if self.user else found


class Builder:
    """Builds the images of Dockerfiles. `root` is a directory of the cache; root's rights are
    needed."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root / "layers")
        self._log = root / "log"
        self._log.mkdir(parents=True, exist_ok=True)

    def build(self, file: Path, context: Path) -> Built:
        """The image of a Dockerfile. Raises DockerfileError for one that is not understood,
        LabError when a step fails."""
        ignore_file = context / ".dockerignore"
        ignore = Ignore(ignore_file.read_text() if ignore_file.exists() else "")
        stages: dict[str, Built] = {}
        built = Built("")
        for number, stage in enumerate(dockerfile.stages(file.read_text())):
            built = self._from(stage.base, stages)
            build = _Stage(
                self,
                built,
                stages,
                Context(context, ignore),
                self._log / f"{context.name}-{number}.log",
            )
            build.log.unlink(missing_ok=True)
            for step in stage.steps:
                build.run(step)
            stages[str(number)] = built
            if stage.name:
                stages[stage.name] = built
        return built

    def _from(self, name: str, stages: Mapping[str, Built]) -> Built:
        if name in stages:
            other = stages[name]
            return Built(
                other.key,
                list(other.layers),
                dict(other.env),
                dict(other.config),
                other.workdir,
                other.user,
            )
        if name == "scratch":
            return Built("scratch")
        layer = base.layer(self.store, name, self._log / "base.log")
        return Built(layer.key, [layer], {"PATH": base.PATH})


@dataclass(frozen=True, slots=True)
class Context:
    """The directory that COPY reads, without what the ignore file leaves out."""

    root: Path
    ignore: Ignore

    def files(self, source: str) -> list[Path]:
        """All files and directories of a source, relative to the context, sorted. Raises LabError
        when there is none."""
        start = self.root / source
        inside = sorted(start.rglob("*")) if start.is_dir() else [start]
        found = [
            path.relative_to(self.root) for path in inside if path.is_symlink() or path.exists()
        ]
        found = [path for path in found if not self.ignore(str(path))]
        if not found:
            raise LabError(f"{start}: nothing to copy, or the ignore file leaves it out")
        return found


class _Stage:
    """One stage while its steps run."""

    def __init__(
        self,
        builder: Builder,
        built: Built,
        stages: Mapping[str, Built],
        context: Context,
        log: Path,
    ) -> None:
        self._store = builder.store
        self._built = built
        self._stages = stages
        self._context = context
        self._step_text = ""
        self.log = log

    def run(self, step: Step) -> None:
        """Do one step."""
        built = self._built
        self._step_text = f"{step.name} {step.text}"[:120]
        match step.name:
            case "ENV":
                built.env |= dockerfile.pairs(step, built.env)
            case "LABEL":
                built.config["Labels"] = {
                    **_dict(built.config.get("Labels")),
                    **dockerfile.pairs(step, built.env),
                }
            case "EXPOSE":
                ports: dict[str, object] = {
                    port if "/" in port else f"{port}/tcp": {} for port in step.text.split()
                }
                built.config["ExposedPorts"] = {**_dict(built.config.get("ExposedPorts")), **ports}
            case "STOPSIGNAL":
                built.config["StopSignal"] = step.text
            case "ENTRYPOINT":
                built.config["Entrypoint"] = dockerfile.arguments(step)
                built.config.pop("Cmd", None)
            case "CMD":
                built.config["Cmd"] = dockerfile.arguments(step)
            case "USER":
                built.user = step.text
            case "WORKDIR":
                built.workdir = str(Path(built.workdir, step.text))
            case _:
                self._layer(step)
                return
        built.next(step.name, step.text)
        if step.name == "WORKDIR" and built.workdir != "/" and built.layers:
            self._execute(f"mkdir -p {shlex.quote(built.workdir)}", plain=True)

    def _layer(self, step: Step) -> None:
        if step.name == "COPY":
            self._copy(step)
        else:
            self._built.next(step.name, step.text)
            self._execute(" ".join(shlex.quote(word) for word in dockerfile.arguments(step)))

    def _execute(self, command: str, prepare: str = "", *, plain: bool = False) -> None:
        """A layer of what a command changes, run by chroot in the merged tree: as the stage has it,
        or `plain`, as root in /."""
        built = self._built
        if not built.layers:
            raise LabError("nothing can be run in an image that begins empty")
        passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
        if Path(_AUTHORITIES).exists() and not prepare:
            prepare = f'mount -t tmpfs tmpfs "$ROOT/mnt"\ntouch "$ROOT{_SHOWN}"\nmount --bind {_AUTHORITIES} "$ROOT{_SHOWN}"'
            passed |= dict.fromkeys(_TRUSTING, _SHOWN)
        environment = {"HOME": "/root", **passed, **built.env}
        words = " ".join(shlex.quote(f"{name}={value}") for name, value in environment.items())
        account = f"--userspec={shlex.quote(built.user)} " if built.user and not plain else ""
        enter = f"cd {shlex.quote('/' if plain else built.workdir)}\n{command}"
        script = "\n".join(
            [
                'mount -t proc proc "$ROOT/proc"',
                _DEVICES,
                *(f'mount --bind {path} "$ROOT{path}"' for path in _BOUND),
                prepare,
                f'exec env -i {words} chroot {account}"$ROOT" /bin/sh -ec {shlex.quote(enter)}',
            ]
        )
        under = tuple(built.layers)

        def make(upper: Path) -> None:
            print(f"  {self._step_text}", flush=True)
            self._store.run(under, upper, script, self.log)

        built.layers.append(self._store.layer(built.key, make))

    def _copy(self, step: Step) -> None:
        copy = dockerfile.copied(step)
        target = str(Path(self._built.workdir, copy.target)) + (
            "/" if copy.target.endswith("/") else ""
        )
        if copy.stage is not None:
            self._copy_stage(step, copy, copy.stage, target)
            return
        files = [path for source in copy.sources for path in self._context.files(source)]
        self._built.next(
            step.name, step.text, *(_fingerprint(self._context.root, path) for path in files)
        )
        if not self._built.layers:
            self._built.layers.append(
                self._store.layer(
                    self._built.key, lambda upper: self._stage_files(copy.sources, upper, target)
                )
            )
            return
        staged = self._store.layer(
            fingerprint(self._built.key, "context"),
            lambda upper: self._stage_files(copy.sources, upper, "/"),
        )
        # Copied by a program within the image, so that its symbolic links mean what they mean
        # there.
        self._execute(
            _copying(self._context.root, copy.sources, target),
            f'mount --bind {staged.key}/tree "$ROOT/mnt"',
            plain=True,
        )

    def _stage_files(self, sources: Sequence[str], upper: Path, target: str) -> None:
        """The sources of the context below `upper`: at their own paths, or, in an image that begins
        empty, at the target."""
        for source in sources:
            for path in self._context.files(source):
                if target == "/":
                    place = upper / path
                elif (self._context.root / source).is_dir():
                    place = upper / target.strip("/") / path.relative_to(source)
                else:
                    place = (
                        upper
                        / target.strip("/")
                        / (path.name if target.endswith("/") or len(sources) > 1 else "")
                    )
                place.parent.mkdir(parents=True, exist_ok=True)
                origin = self._context.root / path
                if origin.is_dir() and not origin.is_symlink():
                    place.mkdir(exist_ok=True)
                else:
                    shutil.copy2(origin, place, follow_symlinks=False)
                shutil.copystat(origin, place, follow_symlinks=False)

    def _copy_stage(self, step: Step, copy: dockerfile.Copy, stage: str, target: str) -> None:
        if stage not in self._stages:
            raise DockerfileError(f"line {step.line}: there is no stage {stage}")
        other = self._stages[stage]
        self._built.next(step.name, step.text, other.key)
        if not self._built.layers:
            raise DockerfileError(
                f"line {step.line}: COPY --from into an empty image is not supported here"
            )
        commands = []
        for source in copy.sources:
            place = shlex.quote("/mnt" + source)
            commands.append(_cp(place, target, f"[ -d {place} ]"))
        self._execute("\n".join(commands), merged(other.layers, '"$ROOT/mnt"'), plain=True)


def _copying(context: Path, sources: Sequence[str], target: str) -> str:
    commands = []
    for source in sources:
        name = "/mnt/" + os.path.normpath(source)
        commands.append(
            _cp(shlex.quote(name), target, "true" if (context / source).is_dir() else "false")
        )
    return "\n".join(commands)


def _cp(source: str, target: str, is_directory: str) -> str:
    """The content of a directory, or a file itself, with root as the owner of what came from the
    context."""
    place = shlex.quote(target)
    parent = shlex.quote(target if target.endswith("/") else str(Path(target).parent))
    return (
        f"if {is_directory}; then mkdir -p {place}; cp -a {source}/. {place}/; "
        f'else mkdir -p {parent}; [ -d {place} ] && set -- {place}/ || set -- {place}; cp -a {source} "$1"; fi'
    )


def _fingerprint(root: Path, path: Path) -> str:
    full = root / path
    status = full.lstat()
    if stat.S_ISLNK(status.st_mode):
        content = str(full.readlink())
    elif stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(full.read_bytes()).hexdigest()
    else:
        content = ""
    return f"{path} {status.st_mode:o} {content}"


def fingerprint(*parts: str) -> str:
    """A short hash of texts, in order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}

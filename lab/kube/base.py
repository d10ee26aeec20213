"""The base of images, in place of `python:X.Y-slim-SUITE`, which only a registry has: the same
Debian, with Debian's own Python X.Y.

What differs from the image of that name: Python is Debian's build of the same minor version and
lives in /usr (a link in /usr/local/bin keeps the path), its pip is the version that Debian has, and
packages come from this machine's mirror, without the suite's updates.
"""

import re
import shlex
import subprocess
from pathlib import Path

from lab.kube.layers import Layer, Store
from lab.process import LabError

PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAME = re.compile(r"python:(\d+\.\d+)-slim-([a-z]+)(?:@sha256:[0-9a-f]{64})?")
# What the image adds to a minimal system, and Python with pip.
_PACKAGES = "ca-certificates,netbase,tzdata,python3,python3-pip-whl"
_RECIPE = "2"  # changes when the lines below do

_SCRIPT = """set -eu
root=$1 suite=$2 mirror=$3 version=$4
debootstrap --variant=minbase --include={packages} "$suite" "$root" "$mirror"
# The headers, which the image has in /usr/local/include. Of the package with them only these: it wants a compiler.
chroot "$root" sh -ec "apt-get update -qq; cd /tmp; apt-get download libpython$version-dev; dpkg -x libpython*.deb x
cp -a x/usr/include/. /usr/include/; rm -r x *.deb"
# pip as in the image: alone, and allowed to change the system. Debian's own package brings others, which pip cannot replace.
rm -f "$root/usr/lib/python$version/EXTERNALLY-MANAGED"
ln -s /usr/bin/python3 "$root/usr/local/bin/python"
ln -s /usr/bin/python3 "$root/usr/local/bin/python3"
chroot "$root" sh -ec 'set -- /usr/share/python-wheels/pip-*.whl; python "$1/pip" install --quiet --no-index --root-user-action ignore "$1"'
printf '#!/bin/sh\\nexit 101\\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
chroot "$root" apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/log/* "$root"/usr/share/doc/* "$root"/usr/share/man/* \\
    "$root"/usr/share/locale/* "$root"/usr/share/info/* "$root"/dev/* "$root"/tmp/*
: >"$root/etc/resolv.conf"
: >"$root/etc/hosts"
"""


def layer(store: Store, name: str, log: Path) -> Layer:
    """The layer in place of the image `name`. Raises LabError for any other image, or when it
    cannot be made."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise LabError(f"{name}: only python:X.Y-slim-SUITE can be put together here")
    version, suite = match[1], match[2]

    def make(tree: Path) -> None:
        print(f"  base: {suite} with Python {version}, by debootstrap", flush=True)
        script = _SCRIPT.format(packages=_PACKAGES)
        namespaces = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
        ]
        with log.open("wb") as file:
            command = [
                *namespaces,
                "sh",
                "-c",
                script,
                "base",
                str(tree),
                suite,
                _mirror(),
                version,
            ]
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise LabError(f"the base cannot be made; the output ({log}) ends with:\n{tail}")
        _check(tree, version)

    return store.layer(f"base-{suite}-python{version}-{_RECIPE}", make)


def _check(tree: Path, version: str) -> None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run(
        ["chroot", str(tree), "python", "-c", code], capture_output=True, text=True, check=False
    )
    if done.stdout.strip() != version:
        raise LabError(
            f"the base has Python {done.stdout.strip() or done.stderr.strip()}, not {version}"
        )


def _mirror() -> str:
    """The mirror that this machine's own packages come from."""
    command = ["apt-get", "indextargets", "--format", "$(LABEL) $(SITE)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        label, _, site = line.partition(" ")
        if label == "Debian" and site:
            return site
    raise LabError(f"no mirror of Debian is known here ({shlex.join(command)} names none)")

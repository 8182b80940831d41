#!/bin/bash
# Runs the sandbox on a kernel that has cgroup v2 alone, in qemu without KVM, from this machine's own files, read-only:
# at the top of the hierarchy, then in a container like a pod's with 11 capabilities and no host path. A minute or
# three each. Needs qemu-system-x86, busybox-static, crun and an unpacked kernel package:
#   apt-get download linux-image-6.1.0-56-amd64-unsigned && dpkg -x linux-image-*.deb KERNEL
#   tools/cgroup2-vm.sh KERNEL [top|pod]
set -euo pipefail
kernel=$(realpath "$1") cases=${2:-top pod}
source=$(realpath "$(dirname "$0")/..") work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/ird/{bin,mod,root,new,proc,sys,dev,up,vm}
cp "$(command -v busybox)" "$work/ird/bin/busybox"
modules="drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_modern_dev
  drivers/virtio/virtio_pci_legacy_dev drivers/virtio/virtio_pci fs/netfs/netfs fs/fscache/fscache net/9p/9pnet
  net/9p/9pnet_virtio fs/9p/9p fs/overlayfs/overlay"
for module in $modules; do cp "$kernel"/lib/modules/*/kernel/"$module.ko" "$work/ird/mod/"; done

cat > "$work/ird/init" <<INIT
#!/bin/busybox sh
PATH=/bin; for command in mount insmod mkdir cp chroot; do busybox ln -s busybox /bin/\$command; done
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in $(echo $modules | tr ' ' '\n' | sed 's#.*/##' | tr '\n' ' '); do insmod /mod/\$module.ko; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose root /root
mount -t tmpfs up /up; mkdir /up/upper /up/work
mount -t overlay over -o lowerdir=/root,upperdir=/up/upper,workdir=/up/work /new
for folder in proc sys dev; do mount --move /\$folder /new/\$folder; done
mount -t tmpfs run /new/run; mkdir -p /new/dev/shm /new/run/vm; mount -t cgroup2 cgroup /new/sys/fs/cgroup
cp /vm/* /new/run/vm/
exec chroot /new /bin/bash /run/vm/main.sh
INIT
chmod +x "$work/ird/init"

cat > "$work/ird/vm/service.sh" <<SERVICE
#!/bin/bash
busybox ip link set lo up
export HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/run/source
cd /run/source
limits="--set maximum_limits.wall_ms=120000 --set default_limits.wall_ms=60000 --set default_limits.cpu_ms=20000"
"$source/.venv/bin/python" -m services.sandbox --set server.port=50056 --set slots=3 --set max_sessions=1 \$limits > /tmp/log 2>&1 &
service=\$!
until grep -q '"listening"' /tmp/log; do sleep 1; kill -0 \$service || { tail -n 3 /tmp/log; exit; }; done
"$source/.venv/bin/python" /run/vm/client.py
kill \$service; wait \$service
SERVICE
cat > "$work/ird/vm/client.py" <<'CLIENT'
import asyncio
from pathlib import Path

from perigee.sandbox.client import SandboxClient

PROGRAMS = [
    ("python", "print(6 * 7)"),
    ("bash", "echo 42"),
    ("python", "held = [bytearray(b'x' * (1 << 20)) for _ in range(1 << 12)]"),
    ("bash", "a=x; while :; do a=$a$a; done"),
    ("python", "import os\nwhile True: os.fork()"),
]


async def main():
    async with SandboxClient.connect("127.0.0.1:50056") as sandbox:
        for language, source in PROGRAMS:
            result = await sandbox.run(source, language=language)
            print(language, result.status, result.stdout, result.cpu_ms, "ms", result.reason, flush=True)
    for path in Path("/sys/fs/cgroup/perigee-sandbox").rglob("cpu.weight"):
        if not path.parent.name.startswith(("slot-", "session-")):
            print(path, path.read_text().strip(), flush=True)


asyncio.run(main())
CLIENT
cat > "$work/ird/vm/bundle.py" <<'BUNDLE'
import json

NAMES = "CHOWN DAC_OVERRIDE FOWNER KILL MKNOD NET_ADMIN SETGID SETPCAP SETUID SYS_ADMIN SYS_CHROOT".split()
GROUPS = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "nodev"]}
mounts = [{"destination": f"/{name}", "type": kind, "source": kind} for name, kind in (("proc", "proc"), ("tmp", "tmpfs"))]
mounts += [{"destination": path, "type": "tmpfs", "source": "tmpfs"} for path in ("/dev", "/dev/shm")]
mounts += [{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}, GROUPS]
mounts += [{"destination": "/run", "type": "bind", "source": "/run", "options": ["rbind", "rw"]}]
capabilities = [f"CAP_{name}" for name in NAMES]
process = {
    "terminal": False,
    "user": {"uid": 0, "gid": 0},
    "args": ["/bin/bash", "/run/vm/service.sh"],
    "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
    "cwd": "/",
    "capabilities": {kind: capabilities for kind in ("bounding", "effective", "permitted")},
}
linux = {
    "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network", "cgroup")],
    "cgroupsPath": "/kubepods/pod",
    "resources": {"memory": {"limit": 1 << 30}, "pids": {"limit": 4096}},
}
config = {"ociVersion": "1.0.2", "process": process, "root": {"path": "rootfs", "readonly": True}, "hostname": "pod"}
with open("config.json", "w") as file:
    json.dump({**config, "mounts": mounts, "linux": linux}, file)
BUNDLE
cat > "$work/ird/vm/main.sh" <<MAIN
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir /run/source; cp -r $source/perigee $source/services /run/source/
echo "Linux \$(uname -r): \$(cat /sys/fs/cgroup/cgroup.controllers)"
if grep -q case=top /proc/cmdline; then
  bash /run/vm/service.sh
else
  cd /sys/fs/cgroup; mkdir system kubepods; echo \$\$ > system/cgroup.procs
  for group in . kubepods; do echo "+cpu +memory +pids" > \$group/cgroup.subtree_control; done
  mkdir -p /run/pod/rootfs; mount --bind / /run/pod/rootfs; cd /run/pod; python3 /run/vm/bundle.py
  crun --root /run/crun run pod
fi
echo o > /proc/sysrq-trigger; sleep 60
MAIN
(cd "$work/ird" && find . | busybox cpio -o -H newc 2> /dev/null | gzip -1 > ../initrd)
for case in $cases; do
  echo "== $case"
  timeout 600 qemu-system-x86_64 -accel tcg -cpu max -m 3072 -smp 2 -nographic -no-reboot -nic none \
    -kernel "$kernel"/boot/vmlinuz-* -initrd "$work/initrd" \
    -append "console=ttyS0 quiet panic=1 cgroup_no_v1=all case=$case" \
    -fsdev local,id=root,path=/,security_model=none,readonly=on,multidevs=remap \
    -device virtio-9p-pci,fsdev=root,mount_tag=root < /dev/null
done

"""Looks for privileges that are left and asks for more."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
with open("/proc/self/status") as file:
    status = dict(line.split(":", 1) for line in file.read().splitlines())
for key in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
    if int(status[key], 16):
        print(key, status[key])
if status["NoNewPrivs"].strip() != "1":
    print("an execve may give privileges")
if status["Seccomp"].strip() != "2":
    print("system calls are not filtered")
for key in ("Uid", "Gid"):
    if min(map(int, status[key].split())) < 1000:
        print(key, status[key])
if set(status["Groups"].split()) - {status["Gid"].split()[0]}:
    print("groups", status["Groups"])
CAPBSET_READ, SET_NO_NEW_PRIVS, SET_SECUREBITS, AMBIENT, RAISE = 23, 38, 28, 47, 2
for attempt in (
    lambda: os.setuid(0),
    lambda: os.setgid(0),
    lambda: os.seteuid(0),
    lambda: os.setresuid(0, 0, 0),
    lambda: os.setresgid(0, 0, 0),
    lambda: os.setgroups([0]),
    lambda: os.chown("/tmp", 0, 0),
):
    try:
        attempt()
        print("an attempt succeeded", attempt.__code__.co_names)
    except OSError:
        pass
if libc.prctl(SET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0:
    print("no_new_privs was taken back")
if libc.prctl(SET_SECUREBITS, 1, 0, 0, 0) == 0:
    print("secure bits were set")
for capability in range(41):
    if libc.prctl(AMBIENT, RAISE, capability, 0, 0) == 0:
        print("raised capability", capability)
print("held")

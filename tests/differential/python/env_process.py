import os
print(os.getpgid(0) == os.getsid(0), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0))

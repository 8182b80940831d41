from concurrent.futures import ThreadPoolExecutor
import time
e = ThreadPoolExecutor(2)
for i in range(4):
    e.submit(lambda i=i: (time.sleep(0.01), print(i) if i == 3 else None))

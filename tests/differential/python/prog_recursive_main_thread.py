# differential: {"stdin": "20000"}
import sys, threading
def main():
    n = int(input())
    def depth(i): return 0 if i == 0 else 1 + depth(i - 1)
    print(depth(n))
sys.setrecursionlimit(1 << 25)
threading.stack_size(1 << 27)
t = threading.Thread(target=main); t.start(); t.join()

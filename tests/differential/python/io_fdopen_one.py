# differential: {"stdin": "3 4\n"}
import os
out = os.fdopen(1, "w")
print(sum(map(int, input().split())), file=out)

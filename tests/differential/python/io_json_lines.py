# differential: {"stdin": "{\"a\": 1}\n{\"a\": 2}\n"}
import json, sys
print(json.dumps([json.loads(line) for line in sys.stdin], sort_keys=True))

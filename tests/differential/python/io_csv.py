# differential: {"stdin": "name,age\nbob,3\n\"x,y\",4\n"}
import csv, sys
rows = list(csv.DictReader(sys.stdin))
writer = csv.DictWriter(sys.stdout, ["age", "name"])
writer.writeheader()
writer.writerows(rows)

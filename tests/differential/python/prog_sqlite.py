import sqlite3
c = sqlite3.connect("db"); c.execute("create table t(a, b)"); c.executemany("insert into t values(?, ?)", [(i, str(i)) for i in range(5)])
print(c.execute("select sum(a), group_concat(b) from t").fetchone()); c.commit()

print({"banana", "apple", "cherry"}, set("hello world"))

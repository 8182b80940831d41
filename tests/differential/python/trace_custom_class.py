class Bad(Exception):
    pass
raise Bad("a", 1)

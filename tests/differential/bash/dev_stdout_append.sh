echo one; echo two >> /dev/stdout; echo three

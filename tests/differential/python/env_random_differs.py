import random, uuid, secrets
print(random.random() == random.random(), len(uuid.uuid4().hex), len(secrets.token_hex(4)))
random.seed(7); print(random.random(), random.sample(range(9), 4), random.choice("abc"), random.gauss(0, 1))

print("\n".join(str(i * i) for i in range(60000)))

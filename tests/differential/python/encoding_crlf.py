if True:
    print('''a
b''')

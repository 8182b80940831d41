# café
print('café')

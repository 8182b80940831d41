# coding: gbk
print('中')

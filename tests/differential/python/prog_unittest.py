import unittest
class T(unittest.TestCase):
    def test_a(self): self.assertEqual(1 + 1, 2)
    def test_b(self): self.assertEqual([1, 2], [1, 3])
    @unittest.skip("later")
    def test_c(self): ...
unittest.main()

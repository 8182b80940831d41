import bz2, gzip, lzma, zlib, hashlib
d = b"data" * 1000
print([len(m.compress(d)) for m in (zlib, bz2, lzma)], gzip.decompress(gzip.compress(d)) == d, zlib.crc32(d), hashlib.sha256(d).hexdigest(), hashlib.md5(d).hexdigest())

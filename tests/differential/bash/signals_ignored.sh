grep -E 'Sig(Ign|Blk)' /proc/self/status

surely-not-there

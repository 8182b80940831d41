"""`perigee prompts`: prompt sets curated as in section 2.1 of the k1.5 report."""

"""Language models as judges: what they are asked, how, and what counts as their verdict."""

"""Images: every form in which files hold them, and the data sets made of them."""

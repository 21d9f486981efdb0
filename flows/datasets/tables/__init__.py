"""Tables: files of rows, the roles of their columns, and the data sets made of them."""

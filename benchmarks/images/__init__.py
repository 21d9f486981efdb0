"""What a flow of images is worth: bits per dimension beside simpler models, and samples that keep their class."""

"""What is kept between runs so that nothing is computed twice: files that prove their content."""

"""The preflight room: what one look at a data set says of its files, copies, classes and parts."""

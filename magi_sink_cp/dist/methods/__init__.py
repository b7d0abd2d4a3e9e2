"""One algorithm of attention across ranks per file, and the parts that they share."""

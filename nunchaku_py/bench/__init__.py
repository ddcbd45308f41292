"""What `nunchaku-py bench` needs: real architectures, inputs, a process for each contender, rows, pictures, a page."""

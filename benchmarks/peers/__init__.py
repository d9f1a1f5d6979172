"""What is measured beside ours: kernels like other projects', written anew, and calls to installed packages."""

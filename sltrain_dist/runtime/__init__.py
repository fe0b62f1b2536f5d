"""The process environment: rank, device, launcher, stop requests, and the watchdog that ends hung processes."""

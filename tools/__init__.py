"""Programs that look after the checkout: measuring, comparing, changing the code on purpose."""

"""What is learned: masked prediction and classification, and what is prepared for them."""

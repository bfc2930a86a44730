"""What is measured at every layer of a frozen body: gaps, spectra and single numbers."""

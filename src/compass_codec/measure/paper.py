"""What the COMPASS paper (Park, Lee, Kim, ICCV 2023) reports, to stand beside what is measured here.

BD-rate of COMPASS against each method in per cent: final layer, RGB PSNR, 24 Kodak pictures, accumulated bits.
"""

SHVC = "SHVC"
SIMULCAST = "simulcast, own base codec"
SINGLE = "single layer, own base codec"
# sets of `make baselines`
FACTORIZED = "simulcast, base codec of factorized"
MEI, MEI_ORIGINAL = "COMPASS with mei", "COMPASS with mei-original"

# Tables 2 and 3: the row of ours that each is set beside, or None; the paper's name; a figure for each scale factor.
Rows = tuple[tuple[str | None, str, tuple[float, ...]], ...]
TWO_SCALES = (1.2, 1.6, 2.0, 2.4, 2.8)
TWO: Rows = (
    (SHVC, "SHVC (SHM-12.4)", (-53.88, -42.58, -35.87, -26.24, -22.34)),
    (SIMULCAST, "Simulcast (Mean-scale)", (-44.04, -31.40, -16.29, -16.35, -12.38)),
    (SINGLE, "Single-layer (Mean-scale)", (-8.19, -3.70, 8.80, 0.31, 0.94)),
    (FACTORIZED, "Simulcast (Factorized)", (-53.04, -44.87, -31.89, -34.62, -31.59)),
    (MEI_ORIGINAL, "Mei et al. (original)", (-36.26, -29.44, -28.20, -33.19, -36.31)),
    (MEI, "Mei et al. (enhanced)", (-29.09, -17.45, -13.52, -20.63, -23.94)),
)
THREE_SCALES = (2.4, 2.8, 3.2, 3.6, 4.0)
THREE: Rows = (
    (SHVC, "SHVC (SHM-12.4)", (-58.33, -51.51, -46.72, -43.65, -33.34)),
    (SIMULCAST, "Simulcast (Mean-scale)", (-49.85, -42.20, -35.33, -30.81, -22.90)),
    (SINGLE, "Single-layer (Mean-scale)", (-6.60, -4.23, -1.25, -0.74, 4.74)),
    (FACTORIZED, "Simulcast (Factorized)", (-61.04, -55.09, -50.42, -47.11, -41.71)),
    (MEI_ORIGINAL, "Mei et al. (original)", (-47.17, -38.73, -34.34, -33.56, -32.12)),
    (MEI, "Mei et al. (enhanced)", (-38.23, -26.46, -19.70, -17.08, -14.23)),
)

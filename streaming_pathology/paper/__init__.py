"The paper's comparison on real prostate tissue."

// Masks the lanes begin..end-1. Included by mask.cc once for each instruction
// set, as ISA with the function attribute TARGET: a target reaches no further
// than a function, and what is inlined must have been written for it.
TARGET void Mask(ISA, const Task& task, int64_t begin, int64_t end) {
  using V = ISA::V;
  constexpr int kN = sizeof(V) / 4, kVectors = kGroup / kN;
  const std::unique_ptr<Row[]> rows(new Row[task.rows.size()]);
  V iota;
  for (int i = 0; i < kN; ++i) iota[i] = i;
  for (int64_t group = begin; group < end; group += kGroup) {
    task.Copy<true>(group, rows.get());
    for (const Pair& pair : task.pairs) {
      for (int v = 0; v < kVectors; ++v) {
        const V counter = iota + uint32_t(group + v * kN);
        V x[kWords];
        for (int w = 0; w < kWords; ++w) x[w] = V{} + pair.begun[w];
        x[12] = counter;
        QUARTER(ISA::Rotate, 0, 4, 8, 12);
        for (int round = 1;; round += 2) {
          QUARTER(ISA::Rotate, 0, 5, 10, 15);
          QUARTER(ISA::Rotate, 1, 6, 11, 12);
          QUARTER(ISA::Rotate, 2, 7, 8, 13);
          QUARTER(ISA::Rotate, 3, 4, 9, 14);
          if (round == 19) break;
          QUARTER(ISA::Rotate, 0, 4, 8, 12);
          QUARTER(ISA::Rotate, 1, 5, 9, 13);
          QUARTER(ISA::Rotate, 2, 6, 10, 14);
          QUARTER(ISA::Rotate, 3, 7, 11, 15);
        }
        x[12] += counter;
        for (int w = 0; w < kWords; ++w) x[w] += pair.first[w];
        if (pair.plus >= 0) {
          V* y = reinterpret_cast<V*>(rows[pair.plus].words) + v;
          for (int w = 0; w < kWords; ++w) y[w * kVectors] += x[w];
        }
        if (pair.minus >= 0) {
          V* y = reinterpret_cast<V*>(rows[pair.minus].words) + v;
          for (int w = 0; w < kWords; ++w) y[w * kVectors] -= x[w];
        }
      }
    }
    task.Copy<false>(group, rows.get());
  }
}

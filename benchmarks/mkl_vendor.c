/* MKL takes its AVX-512 path on every processor that has it, not only on
   Intel's, when this is loaded before it. */
int mkl_serv_intel_cpu_true(void) { return 1; }

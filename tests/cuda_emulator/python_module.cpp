// The emulator's own Python interface: the submodule `emulator` of every extension.
#include "python_module.hpp"

#include "runtime.hpp"

namespace hessreg::emulator {

namespace py = pybind11;

namespace {

using namespace pybind11::literals;

py::dict configuration() {
  const Config& options = config();
  return py::dict("order"_a = name_of(options.order), "seed"_a = options.seed,
                  "resident"_a = options.resident_blocks, "preempt"_a = options.preempt_period,
                  "profile"_a = options.profile, "skip_file"_a = options.skipped_barrier_file,
                  "skip_line"_a = options.skipped_barrier_line, "shared"_a = options.shared_limit);
}

// Changes the named options only.
void configure(const py::kwargs& changes) {
  py::dict all = configuration();
  for (const auto& [name, value] : changes) {
    if (!all.contains(name)) {
      throw py::type_error("no such option of the emulator: " + std::string(py::str(name)));
    }
    all[name] = value;
  }
  config() = {.order = order_from_name(py::cast<std::string>(all["order"])),
              .seed = py::cast<uint64_t>(all["seed"]),
              .resident_blocks = py::cast<int>(all["resident"]),
              .preempt_period = py::cast<int>(all["preempt"]),
              .profile = py::cast<bool>(all["profile"]),
              .skipped_barrier_file = py::cast<std::string>(all["skip_file"]),
              .skipped_barrier_line = py::cast<int>(all["skip_line"]),
              .shared_limit = py::cast<size_t>(all["shared"])};
}

// Counted since the start of the process.
py::dict counts() {
  const Statistics& s = statistics();
  return py::dict("blocks"_a = s.blocks, "threads"_a = s.threads, "switches"_a = s.switches,
                  "barriers"_a = s.barriers, "skipped_barriers"_a = s.skipped_barriers,
                  "collectives"_a = s.collectives, "accesses"_a = s.accesses);
}

py::list profile() {
  py::list entries;
  for (const ProfileEntry& entry : take_profile()) {
    const char* const accesses[] = {"load", "store", "atomic"};
    entries.append(py::dict("where"_a = entry.where, "space"_a = entry.shared ? "shared" : "global",
                            "access"_a = accesses[static_cast<int>(entry.access)],
                            "bytes"_a = entry.bytes, "requests"_a = entry.requests,
                            "transactions"_a = entry.transactions,
                            "fewest_possible"_a = entry.fewest_possible));
  }
  return entries;
}

}  // namespace

void bind_emulator(py::module_& module) {
  py::module_ emulator = module.def_submodule("emulator");
  emulator.attr("checked") = checker_enabled();
  emulator.def("configuration", &configuration);
  emulator.def("configure", &configure);
  emulator.def("statistics", &counts);
  emulator.def("take_profile", &profile);
}

}  // namespace hessreg::emulator

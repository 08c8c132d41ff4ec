#include "emulator/races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace simt {
namespace {

// The line of an address in a program, from the debug information; "module+offset" where there is none.
std::string line_of(const void* pc) {
  Dl_info info{};
  if (!dladdr(pc, &info) || !info.dli_fname) return "an unknown place";
  char command[1024], buffer[512];
  const size_t offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  std::string line;
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(buffer, sizeof buffer, pipe)) line += buffer;
    pclose(pipe);
  }
  line = line.substr(0, line.find_first_of(" \n"));
  if (!line.empty() && line[0] != '?') return line;
  std::snprintf(buffer, sizeof buffer, "%s+0x%zx", info.dli_fname, offset);
  return buffer;
}

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

std::string describe(const char* what, const Site& at) {
  if (at.pc) return std::string(what) + " at " + line_of(at.pc);
  if (!at.file) return what;
  const char* slash = std::strrchr(at.file, '/');
  return std::string(what) + " at " + (slash ? slash + 1 : at.file) + ":" + std::to_string(at.line);
}

void Races::release(size_t thread, Clock& into) {
  join(into, clocks_[thread]);
  ++clocks_[thread][thread];
}

void Races::acquire(size_t thread, const Clock& from) { join(clocks_[thread], from); }

std::string Races::access(size_t thread, const void* address, int bytes, bool write, const char* what, Site at,
                          const std::function<std::string(size_t)>& name) {
  const Access now{uint32_t(thread), clocks_[thread][thread], what, at};
  const auto conflict = [&](const Access& before) {
    return "race: " + describe(what, at) + " and " + describe(before.what, before.at) + " by " + name(before.thread) +
           " are not ordered";
  };
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) / 2;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / 2;
  for (uintptr_t a = first; a <= last; ++a) {
    Cell& cell = cells_[a];
    if (cell.write.time && !ordered(cell.write, thread)) return conflict(cell.write);
    if (write) {
      for (const Access& r : cell.reads)
        if (!ordered(r, thread)) return conflict(r);
      cell.reads.clear();
      cell.write = now;
    } else {  // a later write must be ordered after this read, and so after those that come before it
      auto& reads = cell.reads;
      reads.erase(std::remove_if(reads.begin(), reads.end(), [&](const Access& r) { return ordered(r, thread); }),
                  reads.end());
      reads.push_back(now);
    }
  }
  return {};
}

void Races::forget(const void* address, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) / 2;
  for (uintptr_t a = first; a <= first + bytes / 2; ++a) cells_.erase(a);
}

}  // namespace simt

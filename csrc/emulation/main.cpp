// A sanitized build as an executable: NAME SEEDS FOLDER, where SEEDS is "0,1,2" and FOLDER/in holds the arguments, each
// as NAME.npy. Results go into FOLDER/out as 0.npy, 1.npy, ... The exit status is 1, with a line on stderr, where a
// kernel breaks a rule of CUDA; a sanitizer that finds something ends the process on its own.
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

#include "emulation/cases.h"

using namespace rqk::emulation;

#ifdef __SANITIZE_ADDRESS__
// A launch that fails leaves its fibers where they are: what they own is lost, on purpose.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

namespace {

// Version 1.0 of the format: magic, two version bytes, a 16-bit header length, a Python dict, the data.
constexpr char kMagic[] = "\x93NUMPY\x01";
constexpr size_t kPreamble = 10;

std::string between(const std::string& text, const std::string& before, const std::string& after) {
  const size_t start = text.find(before);
  const size_t end = start == std::string::npos ? start : text.find(after, start + before.size());
  if (end == std::string::npos) fail("not the .npy header expected: " + text);
  return text.substr(start + before.size(), end - start - before.size());
}

Array load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string all((std::istreambuf_iterator<char>(file)), {});
  if (all.size() < kPreamble || all.compare(0, 7, kMagic) != 0) fail(path + " is no .npy file of version 1");
  const size_t header = static_cast<unsigned char>(all[8]) | static_cast<unsigned char>(all[9]) << 8;
  const std::string text = all.substr(kPreamble, header);
  if (text.find("'fortran_order': False") == std::string::npos) fail(path + " must be C-contiguous");
  Array array;
  array.dtype = between(text, "'descr': '", "'");
  std::istringstream sizes(between(text, "'shape': (", ")"));
  for (std::string size; std::getline(sizes, size, ',');) {
    if (size.find_first_of("0123456789") != std::string::npos) array.shape.push_back(std::stoll(size));
  }
  array.data.resize(all.size() - kPreamble - header);
  if (!array.data.empty()) std::memcpy(array.data.data(), all.data() + kPreamble + header, array.data.size());
  return array;
}

void save(const std::string& path, const Array& array) {
  std::string text = "{'descr': '" + array.dtype + "', 'fortran_order': False, 'shape': (";
  for (const int64_t size : array.shape) text += std::to_string(size) + ", ";
  text += "), }";
  text.resize((kPreamble + text.size()) / 64 * 64 + 64 - kPreamble - 1, ' ');
  text += '\n';
  std::ofstream file(path, std::ios::binary);
  file.write(kMagic, 8);
  file.put(static_cast<char>(text.size() & 0xff));
  file.put(static_cast<char>(text.size() >> 8));
  file << text;
  file.write(reinterpret_cast<const char*>(array.data.data()), static_cast<std::streamsize>(array.data.size()));
  if (!file.flush()) fail("cannot write " + path);
}

int run(const std::string& name, const std::string& seed_list, const std::string& folder) {
  std::map<std::string, Array> arguments;
  for (const auto& file : std::filesystem::directory_iterator(folder + "/in")) {
    arguments.emplace(file.path().stem().string(), load(file.path().string()));
  }
  std::vector<uint64_t> seeds;
  std::istringstream list(seed_list);
  for (std::string seed; std::getline(list, seed, ',');) seeds.push_back(std::stoull(seed));
  const Results results = run_case(name, std::move(arguments), seeds);
  for (size_t i = 0; i < results.size(); ++i) save(folder + "/out/" + std::to_string(i) + ".npy", results[i]);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s NAME SEEDS FOLDER\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
